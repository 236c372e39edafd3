"""The selective scan: the functions for models, the PyTorch operators that they call and what runs them."""

from mdnet.scan.function import selective_scan
from mdnet.scan.interface import (
    causal_conv1d_fn,
    mamba_chunk_scan_combined,
    selective_scan_fn,
    selective_state_update,
)
from mdnet.scan.op import selective_scan_backward

__all__ = [
    "causal_conv1d_fn",
    "mamba_chunk_scan_combined",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_fn",
    "selective_state_update",
]
