"""The kernel's stages need PyTorch and NumPy alone, and no installed checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_scripts import REPOSITORY, checkout

BARE = """
import sys

class Lacking:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Lacking, sys.meta_path)

from gpu import check, journal, worker
import gpu_check
stages = {{stage.name: stage for stage in check.STAGES}}
with open("journal", "w") as file:
    for name in {stages}:
        stage = stages[name]
        request = dict(function=stage.function, arguments=(), needs=stage.needs, device="cpu", sizes="tiny")
        assert worker.run({{**request, "scratch": ".", "bundles": ".", "seconds": 500}}, journal.Writer(file, []))
"""
PACKAGES = (
    *("pydantic", "diffusers", "safetensors", "PIL", "click", "rich", "onnx", "onnxscript", "onnxruntime"),
    *("ml_dtypes", "pytest", "tensorrt", "tensorrt_rtx", "polygraphy", "cuda", "mamba_ssm"),
)


def test_a_bare_machine_runs_the_stages_of_the_kernel(tmp_path: Path) -> None:
    stages = ("device", "scan", "scan time", "sanitizer")
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(names=set(PACKAGES), stages=stages)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(checkout.import_paths()), "PATH": str(tmp_path)},  # no g++
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line).get("row") for line in (tmp_path / "journal").read_text().splitlines()]
    found = {row["name"]: row for row in rows if row}
    lacking = {name for name, row in found.items() if row["status"] == "not installed"}
    assert lacking == {name for name in found if "mamba-ssm" in name or name == "address sanitizer"}
    assert {row["status"] for name, row in found.items() if name not in lacking} == {"passed"}
    assert found["bfloat16, reverse"]["figures"]["cases"] > 1


def test_a_checkout_that_is_not_installed_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout.importlib.util, "find_spec", lambda name: None)
    program = "import mdnet, mdnet_engines.cuda.kernel as k; print(mdnet.__version__, len(k.ptx()), k.__file__)"
    # -S: no site-packages, so that what is installed here can't help.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(checkout.import_paths())},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    version, length, file = done.stdout.split()
    assert version == "0"
    assert int(length) > 10_000
    assert Path(file).is_relative_to(REPOSITORY)
