"""Precision as a rewrite of the ONNX graphs."""
