"""Check exported files against transformers: layer by layer, part by part, or by the checkpoint's own code."""
