"""CUDA: the scan's kernel as source and PTX, and the runtime calls that sessions need."""
