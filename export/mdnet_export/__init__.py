"""MD-Net → three ONNX graphs → a bundle that is proven to give PyTorch's scores."""
