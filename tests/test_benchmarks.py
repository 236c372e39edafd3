"""The benchmarks run: a script that is only run by hand is broken when it is needed. No figure is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundle import write_small_bundle

from mdnet_engines import native

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its native library")
def test_scan_measures_every_contestant_against_every_other(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "scan.py", "--only", "scan, B=1", "--rounds", "1", "-o", "figures.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (suite,) = json.loads((tmp_path / "figures.json").read_text())["results"].values()
    assert len(suite) == 5
    for name, figures in suite.items():
        assert set(figures) == {"ms", *suite} - {name}


def test_training_measures_an_epoch_with_the_cache_and_without(tmp_path: Path) -> None:
    options = ["--images", "12", "--batch-size", "6", "--rounds", "1", "-o", "figures.json"]
    command = [sys.executable, BENCHMARKS / "training.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 12
    assert all(figures[name]["ms_per_image"] > 0 for name in ("cached", "recomputed"))


@pytest.mark.skipif(native.custom_op_library() is None, reason="mdnet was installed without its native library")
def test_precision_measures_a_bundle_against_pytorch(tmp_path: Path) -> None:
    options = ["--preset", "demo", "--only", "ONNX Runtime, fp32", "--rounds", "1", "-o", "figures.json"]
    command = [sys.executable, BENCHMARKS / "precision.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["contestants"].values()
    assert all(figures[name] > 0 for name in ("ms", "baseline_ms", "speedup", "peak_gib", "baseline_peak_gib"))


def test_runtime_measures_a_start_and_peak_memory(tmp_path: Path) -> None:
    bundle = write_small_bundle(tmp_path / "bundle")
    options = ["start", "memory", "small", "--files", "1500", "--rounds", "1", "--demo", bundle, "--full", bundle]
    command = [sys.executable, BENCHMARKS / "runtime.py", *options, "-o", "figures.json"]
    result = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["memory"]["few_mib"] > 0
    assert figures["start"]["median_s"] > 0
    assert figures["small"]["ratio"] > 0
