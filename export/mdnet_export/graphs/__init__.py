"""MD-Net as three ONNX graphs, and their variant for ONNX Runtime on the CPU."""
