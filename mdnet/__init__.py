"""MD-Net in PyTorch: the model, its checkpoints, data, training and evaluation."""

from importlib.metadata import version

__version__ = version("mdnet")
