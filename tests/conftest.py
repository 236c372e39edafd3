"""Tests marked `gpu` are skipped, with their reason, where PyTorch sees no GPU."""

from __future__ import annotations

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    torch = pytest.importorskip("torch", reason="needs PyTorch, to see whether there is a CUDA GPU")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
