"""What `benchmarks/gpu/served.py` makes of the providers that a profile names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gpu_scripts import module

from mdnet.model.config import preset
from mdnet_engines.sessions.placement import Placement

served, context_module = module("served"), module("context")

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SCANS = preset("demo").vim_depth  # of each direction


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The row's figures, for graphs whose profile says this."""

    def of(nodes: dict[tuple[str, str], int]) -> dict[str, Any]:
        monkeypatch.setattr(served, "run_graphs", lambda *_: {})
        monkeypatch.setattr(served, "end_profiles", lambda _: Placement(nodes))
        context = SimpleNamespace(sizes=SimpleNamespace(config=lambda: preset("demo")))
        return served._nodes(context, {}, CUDA)

    return of


def scans(provider: str, reverse: int = SCANS) -> dict[tuple[str, str], int]:
    return {("SelectiveScan", provider): SCANS, ("SelectiveScanReverse", provider): reverse}


def test_nodes_that_cuda_left_to_the_cpu_are_counted_and_named(figures: Any) -> None:
    found = figures({**scans(CUDA), ("Conv", CUDA): 9, ("Gather", CPU): 1, ("Shape", CPU): 3})
    assert found == {"selective scans": 2 * SCANS, "nodes on another provider": 4, "of them": "3 Shape, 1 Gather"}
    assert figures(scans(CUDA)) == {"selective scans": 2 * SCANS, "nodes on another provider": 0}


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        (scans(CPU), f"{2 * SCANS} on {CPU}"),
        ({**scans(CUDA, reverse=SCANS - 1), ("SelectiveScanReverse", CPU): 1}, f"1 on {CPU}"),
        ({("Scan", CUDA): 2 * SCANS}, "ran as its function body"),
        (scans(CUDA, reverse=SCANS - 1), "ran as its function body"),
    ],
)
def test_a_scan_on_the_cpu_or_expanded_fails_the_row(
    nodes: dict[tuple[str, str], int], says: str, figures: Any
) -> None:
    with pytest.raises(context_module.CheckFailed, match=says) as failed:
        figures(nodes)
    assert failed.value.figures["selective scans"] < 2 * SCANS
