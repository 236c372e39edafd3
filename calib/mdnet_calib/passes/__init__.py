"""Rewrites of ONNX graphs: FP16, Q/DQ, bfloat16, fusions for ONNX Runtime on the CPU."""
