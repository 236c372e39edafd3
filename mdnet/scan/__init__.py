"""The selective scan: the PyTorch operator and what runs it."""

from mdnet.scan.op import selective_scan, selective_scan_backward

__all__ = ["selective_scan", "selective_scan_backward"]
