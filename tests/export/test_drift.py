"""What a budget is judged by: the worst of the backends that may serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import LIMITS_SCALE
from mdnet_export import drift
from mdnet_export.drift import BudgetCheck

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)


class Fake:
    """A graph that scores an image by its mean colour, off by `by` in the quantised encoder."""

    def __init__(self, name: str, by: float = 0.0):
        self.name, self.by = name, by

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.name == "vim":
            return {"tokens": np.zeros(1)}
        if self.name == "encoder":
            return {"down": feeds["image"].mean((1, 2, 3)) / 32 + self.by}
        return {"score": feeds["down"].astype(np.float32)}


def check(monkeypatch: pytest.MonkeyPatch, **off: float) -> BudgetCheck:
    """Of backends that are off by so much once a node is quantised; NaN can't run."""
    quantised: list[str] = []

    def open_on(backend: str, folder: Path, name: str) -> Any:
        by = off[backend] * bool(quantised) if name == "encoder" and folder == Path("scratch") else 0.0
        if np.isnan(by):
            raise MDNetError("no such operator")
        return Fake(name, by)

    monkeypatch.setattr(drift, "cpu_backends", lambda: list(off))
    monkeypatch.setattr(drift, "open_on", open_on)
    monkeypatch.setattr(drift, "open_for_cpu", lambda folder, name: Fake(name))
    monkeypatch.setattr(drift, "OrtSession", lambda file: Fake(file.stem))

    def write(nodes: list[str]) -> None:
        quantised[:] = nodes

    return BudgetCheck(Path("folder"), Path("scratch"), write, PIXELS, LIMITS_SCALE)


@pytest.mark.parametrize("first", [0.01, 0.06])
def test_the_worst_backend_counts(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch, **{"onnxruntime-cpu": first, "openvino": 0.03})
    result = found(["conv"])
    assert result.max_abs == pytest.approx(max(first, 0.03), abs=1e-6)
    assert result.mean_abs == pytest.approx(max(first, 0.03), abs=1e-6)
    assert found.alone(["conv"]).max_abs == pytest.approx(max(first, 0.03), abs=1e-6)
    assert found([]).max_abs == pytest.approx(0, abs=1e-6)


def test_a_backend_that_can_not_run_the_graphs_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check(monkeypatch, **{"onnxruntime-cpu": 0.01, "openvino": np.nan})
    assert found(["conv"]).max_abs == pytest.approx(0.01, abs=1e-6)
    assert list(found.fusion) == ["onnxruntime-cpu"]


def test_the_one_backend_that_always_serves_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MDNetError, match="no such operator"):
        check(monkeypatch, **{"onnxruntime-cpu": np.nan})(["conv"])
