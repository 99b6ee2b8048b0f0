"""`export onnx`: load the model, trace the graph, stream the weights into the file, validate it."""
