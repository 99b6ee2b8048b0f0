"""Running an LFM2 graph: what the session declares, the cache, one call, and what a call cannot take."""
