"""The names of ONNX files, as Transformers.js reads them. A precision's suffix follows each, such as `_q4`."""

ONNX_FOLDER = "onnx"
MODEL = "model"  # of a model in one file
# Of a model that takes pictures.
VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
