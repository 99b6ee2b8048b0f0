"""The model types that this package exports. A command reads them without importing anything heavy."""

MODEL_TYPES = ("lfm2", "lfm2_moe", "lfm3", "lfm2_vl", "lfm2-vl", "lfm3_vl", "granitemoehybrid", "olmo_hybrid")
