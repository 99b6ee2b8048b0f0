"""Every file of an exported folder besides the ONNX files and their weights."""
