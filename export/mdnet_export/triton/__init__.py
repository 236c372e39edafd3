"""A model repository for NVIDIA Triton."""
