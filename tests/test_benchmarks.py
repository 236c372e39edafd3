"""The benchmarks run: a script that is only run by hand is broken when it is needed. No figure is looked at."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundle import write_small_bundle

from mdnet_engines.ops import native

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
needs_library = pytest.mark.skipif(
    native.custom_op_library() is None, reason="mdnet was installed without its native library"
)


@needs_library
@pytest.mark.parametrize(
    ("only", "least"), [("scan, B=1", 5), ("long scan, L=2304", 2), ("VMamba", 4), ("one token", 4)]
)
def test_scan_measures_every_contestant_against_every_other(only: str, least: int, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "scan.py", "--only", only, "--rounds", "1", "-o", "figures.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (suite,) = json.loads((tmp_path / "figures.json").read_text())["results"].values()
    assert len(suite) >= least
    if "mambapy" in result.stdout and importlib.util.find_spec("mambapy") is None:
        assert "not installed" in result.stdout
    for name, figures in suite.items():
        assert set(figures) == {"ms", *suite} - {name}


@needs_library
def test_winograd_measures_every_build_that_this_processor_has(tmp_path: Path) -> None:
    options = ["--only", "U-Net, level 3", "--rounds", "1", "-o", "figures.json"]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "winograd.py", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (layer,) = json.loads((tmp_path / "figures.json").read_text())["results"].values()
    assert len(layer["rows"]) == 12
    missing = {name for name, row in layer["rows"].items() if "reason" in row}
    assert missing == {line.split(": ")[1] for line in result.stdout.splitlines() if "not measured" in line}
    assert "direct int8, ONNX Runtime" not in missing


@pytest.mark.slow
@needs_library
def test_each_foreign_model_is_measured_against_its_own_slow_path(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "scan_models.py", "--rounds", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = result.stdout.splitlines()[1:]
    assert len(rows) == 8
    assert all(row.endswith("×") or "not installed" in row for row in rows)


@pytest.mark.slow
def test_training_measures_an_epoch_with_the_cache_and_without(tmp_path: Path) -> None:
    options = ["--images", "12", "--batch-size", "6", "--rounds", "1", "-o", "figures.json"]
    command = [sys.executable, BENCHMARKS / "training.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["images"] == 12
    for name in ("cached", "recomputed"):
        assert min(figures[name][key] for key in ("ms_per_image", "first_epoch_s", "cached_is_x_faster")) > 0
        assert -1 <= figures[name]["validation_pearson"] <= 1


@pytest.mark.slow
@needs_library
def test_throughput_measures_streams_at_every_batch_size(tmp_path: Path) -> None:
    options = ["--precision", "fp32", "--batch-sizes", "1,2", "--batches", "2", "--rounds", "1", "-o", "figures.json"]
    options += ["--only", "auto, a stream for each thread", "--only", "THROUGHPUT"]
    command = [sys.executable, BENCHMARKS / "throughput.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["contestants"]
    assert len(rows) == 3
    for row in rows.values():
        assert "reason" in row or set(row["batch sizes"]) == {"1", "2"}
    streams = rows["auto, a stream for each thread"]
    assert streams["streams"] == 2
    assert all(min(figures.values()) > 0 for figures in streams["batch sizes"].values())


@pytest.mark.slow
@needs_library
def test_precision_measures_a_bundle_against_pytorch(tmp_path: Path) -> None:
    options = ["--preset", "demo", "--only", "ONNX Runtime, fp32", "--rounds", "1", "-o", "figures.json"]
    command = [sys.executable, BENCHMARKS / "precision.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text())["contestants"].values()
    assert all(figures[name] > 0 for name in ("ms", "baseline_ms", "speedup", "peak_gib", "baseline_peak_gib"))


@pytest.mark.slow
@needs_library
def test_precision_has_a_row_with_the_reason_for_what_can_not_run(tmp_path: Path) -> None:
    """One bundle can't be built, since something else lies there, and OpenVINO crashes; the rest is measured."""
    broken = tmp_path / "site" / "openvino"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    for name in ("fp32/manifest.json", "int8/holiday.txt"):
        (tmp_path / "bundles" / name).parent.mkdir(parents=True)
        (tmp_path / "bundles" / name).touch()
    only = [option for name in ("Runtime, int8", "own conversion, fp32", "Python loop") for option in ("--only", name)]
    options = ["--preset", "demo", *only, "--rounds", "1", "--bundles", "bundles", "-o", "figures.json"]
    result = subprocess.run(
        [sys.executable, BENCHMARKS / "precision.py", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(broken.parent)},
    )
    assert result.returncode == 0, result.stderr
    loop, refused, crashed = json.loads((tmp_path / "figures.json").read_text())["contestants"].values()
    assert loop["speedup"] > 0
    assert "int8" in refused["reason"]
    assert "not a bundle" in refused["reason"]
    assert "SIGSEGV" in crashed["reason"]
    assert all(row["reason"] in result.stdout for row in (refused, crashed))


def test_precision_keeps_the_figures_of_a_run_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("precision", BENCHMARKS / "precision.py")
    assert spec is not None
    assert spec.loader is not None
    precision = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(precision)

    def against_baseline(name: str, *_: object) -> dict[str, float]:
        if name == "torch.compile":
            raise KeyboardInterrupt
        return {"ms": 1.0}

    monkeypatch.setattr(precision, "against_baseline", against_baseline)
    arguments = ["--only", "Python loop", "--only", "torch.compile", "-o", os.fspath(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", ["precision.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        precision.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["contestants"] == {"PyTorch eager, scan in a Python loop": {"ms": 1.0}}
    assert {"processor", "instruction_sets"} <= set(figures["machine"])


@pytest.mark.slow
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
