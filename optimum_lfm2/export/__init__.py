"""Trace the graph, finish it, quantise it, and stream the weights in. A folder is written whole or not at all."""
