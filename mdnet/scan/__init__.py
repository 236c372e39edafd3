"""The selective scan: the function for models, the PyTorch operators that it calls and what runs them."""

from mdnet.scan.function import selective_scan
from mdnet.scan.op import selective_scan_backward

__all__ = ["selective_scan", "selective_scan_backward"]
