"""This machine: cores, GPU, child processes, output paths."""
