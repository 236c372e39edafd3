"""A stand-in for GPU, CUDA and TensorRT (tests/support/gpu_stand_in)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_stand_in import Gpu, make_cuda, make_tensorrt, write_plans

from mdnet_engines.tensorrt.plan_builder import MODULES


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU with both libraries. What it notes, and what was left on it, fails the test."""
    made = Gpu()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", make_cuda(made))
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, make_tensorrt(made, module))
    yield made
    assert made.problems == []
    assert made.leaks() == {}
    assert made.pending == []


@pytest.fixture
def plans(tmp_path: Path) -> dict[Any, Path]:
    return write_plans(tmp_path)
