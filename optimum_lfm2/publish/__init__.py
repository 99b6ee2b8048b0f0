"""Writing a folder for the Hub: ONNX files in several precisions, the runtimes' configuration and a model card."""
