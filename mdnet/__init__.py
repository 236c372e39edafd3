"""MD-Net in PyTorch: the model, its checkpoints, data, training and evaluation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mdnet")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0"
