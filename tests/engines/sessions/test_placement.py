"""Where nodes ran: real profiles of ONNX Runtime on the CPU provider, with and without our library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from scan_cases import REFUSED_CASE, assert_close, make_inputs, reference_scan
from scan_model import model

from mdnet_engines.ops import native
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.placement import Placement, end_profiles

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
compiled = pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its library")

Open = Callable[[str], OrtSession]


@pytest.fixture
def profiled(tmp_path: Path) -> Open:
    """A session of one scan that has run three times."""

    def opened(name: str) -> OrtSession:
        onnx.save(model(name), tmp_path / f"{name}.onnx")
        session = OrtSession(tmp_path / f"{name}.onnx", profile=tmp_path)
        for _ in range(3):
            session.run(make_inputs(REFUSED_CASE))
        return session

    return opened


@compiled
def test_scans_that_ran_as_our_operator_on_the_provider_are_right(profiled: Open) -> None:
    placement = end_profiles([profiled(scan_op.FORWARD), profiled(scan_op.REVERSE)])
    assert placement.nodes == {(scan_op.FORWARD, CPU): 1, (scan_op.REVERSE, CPU): 1}
    assert placement.scan_problem(CPU, 2) == ""
    assert placement.elsewhere(CPU) == {}


@compiled
def test_a_scan_on_another_provider_is_a_problem(profiled: Open) -> None:
    """As when CUDA was asked for and its kernel was not registered."""
    placement = end_profiles([profiled(scan_op.FORWARD)])
    assert placement.scan_problem(CUDA, 1) == f"0 of 1 selective scans ran on {CUDA}, 1 on {CPU}"
    assert placement.elsewhere(CUDA) == {scan_op.FORWARD: 1}


def test_a_scan_that_was_expanded_into_its_function_body_is_a_problem(
    profiled: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "custom_op_library", lambda: None)
    placement = end_profiles([profiled(scan_op.FORWARD)])
    assert placement.scan_problem(CPU, 1).startswith("0 of 1 selective scans ran as our operator")
    assert placement.nodes["Scan", CPU] == 1  # of ONNX, whose body's steps are not counted one by one
    assert placement.nodes["Exp", CPU] == 1


def test_a_missing_scan_is_a_problem_and_other_nodes_are_counted_by_operator() -> None:
    nodes = {("SelectiveScan", CUDA): 24, ("SelectiveScanReverse", CUDA): 23, ("Gather", CPU): 2, ("Shape", CPU): 5}
    placement = Placement({**nodes, ("Conv", CUDA): 60})
    assert placement.scans(CUDA) == 47
    assert placement.scan_problem(CUDA, 47) == ""
    assert placement.scan_problem(CUDA, 48).startswith("47 of 48 selective scans ran as our operator")
    assert list(placement.elsewhere(CUDA).items()) == [("Shape", 5), ("Gather", 2)]


def test_after_its_profile_has_ended_a_session_runs_on_without_one(profiled: Open, tmp_path: Path) -> None:
    session = profiled(scan_op.FORWARD)
    end_profiles([session])
    (file,) = tmp_path.glob("*.json")
    size, inputs = file.stat().st_size, make_inputs(REFUSED_CASE)
    assert_close(session.run(inputs)["y"], reference_scan(**inputs))
    assert file.stat().st_size == size
    assert np.all(np.isfinite(session.run(inputs)["y"]))
