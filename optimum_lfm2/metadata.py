"""What an exported file says of itself: the keys of its metadata."""

# For our runtime. A graph without them, by another exporter, is taken to be right for unpadded rows only.
ANY_PADDING = "optimum_lfm2.any_padding"
IN_PLACE = "optimum_lfm2.kv_cache_in_place"

# For the model card: what the checks of a published file found.
DIFFERENCE = "optimum_lfm2.difference"
COMPARED = "optimum_lfm2.compared"
QUALITY = "optimum_lfm2.quality"
TEXT = "optimum_lfm2.quality_text"
CHECKPOINT = "optimum_lfm2.checkpoint"
