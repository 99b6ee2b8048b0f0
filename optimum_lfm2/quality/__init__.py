"""Measuring how much quality an export loses, and the 8-bit KV cache, whose scales are chosen on a text."""
