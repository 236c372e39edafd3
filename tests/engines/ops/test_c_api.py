"""Our header of ONNX Runtime's C interface: each entry, called through a session of the ONNX Runtime installed here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import ort_slots
import pytest
from ort_slots import probe

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or ort_slots.COMPILER is None, reason="needs Linux and a C++ compiler"
)
OURS = (ort_slots.ROOM / ort_slots.HEADER).read_text()


def run(library: Path) -> subprocess.CompletedProcess[str]:
    support = str(Path(ort_slots.__file__).parents[1])
    command = [sys.executable, "-m", "ort_slots.probe", str(library)]
    environment = {**os.environ, "PYTHONPATH": support}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return run(ort_slots.build(tmp_path_factory.mktemp("slots")))


def test_every_entry_of_the_header_is_called_in_a_session(done: subprocess.CompletedProcess[str]) -> None:
    assert {"CreateStatus", "KernelContext_GetGPUComputeStream", "CreateKernelV2"} < {*ort_slots.entries(OURS)}
    assert sorted(json.loads(done.stdout)["called"]) == sorted(ort_slots.entries(OURS))


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = probe.X * probe.SCALE + probe.OFFSET + probe.CONSTANT  # by attributes, a constant input and all threads
    np.testing.assert_array_equal(np.array(found["y"], np.float32), expected)
    np.testing.assert_array_equal(np.array(found["again"], np.float32), expected)
    assert found["refused"].startswith("InvalidArgument: ")
    assert "ort_slots: a negative offset" in found["refused"]
    assert found["version"] == onnxruntime.__version__


def test_each_gives_what_it_should(done: subprocess.CompletedProcess[str]) -> None:
    check(done)


GAPS = len(re.findall(r"Skip<\d+> skip\d+;", OURS))


def moved(gap: int) -> str:
    """The header with the entries between a gap and the next one a place further, and all others in theirs."""

    def other(match: re.Match[str]) -> str:
        places, number = int(match[1]), int(match[2])
        return f"Skip<{places + (number == gap) - (number == gap + 1)}> skip{number};"

    header = re.sub(r"^MDNET_AT.*", "", OURS, flags=re.MULTILINE)
    return re.sub(r"Skip<(\d+)> skip(\d+);", other, header)


@pytest.mark.parametrize("gap", range(1, GAPS + 1))
def test_an_entry_in_another_place_is_noticed(gap: int, tmp_path: Path) -> None:
    """Its neighbour in ONNX Runtime's table can't pass for it: a crash, an error or other outputs."""
    library = ort_slots.build(tmp_path, moved(gap))
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        check(run(library))
