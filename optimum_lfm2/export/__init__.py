"""From a transformers model to an ONNX file: the graph, its trace, the weights that are streamed into it."""
