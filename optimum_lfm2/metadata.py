"""The metadata keys that an exported ONNX file carries."""

# The runtime reads these. A graph of another exporter has none; the runtime then feeds it unpadded rows only.
ANY_PADDING = "optimum_lfm2.any_padding"
IN_PLACE = "optimum_lfm2.kv_cache_in_place"

# The model card reads these. They record what the checks of a published file found.
DIFFERENCE = "optimum_lfm2.difference"
COMPARED = "optimum_lfm2.compared"
QUALITY = "optimum_lfm2.quality"
TEXT = "optimum_lfm2.quality_text"
CHECKPOINT = "optimum_lfm2.checkpoint"
