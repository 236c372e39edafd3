"""The real size, with random weights: `sd15-vim-s` is exported, proven, scored and built within the promised memory."""

from __future__ import annotations

import importlib.util
import json
import resource
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.tensorrt.plans import check_plans, plans_folder
from mdnet_export.parity_images import parity_images
from mdnet_rt import Scorer

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
GIB = 2**20  # in the KiB that getrusage counts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    work = tmp_path_factory.mktemp("full")
    command = [EXPORT, "build", "--preset", "sd15-vim-s", "--random-init", "--num-images", "2", "-o", "bundle"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Bundle.open(work / "bundle")


def test_full_size_is_built_within_8_gib_and_scores(full_bundle: Bundle) -> None:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak memory of the full-size build: {peak / GIB:.2f} GiB")
    assert peak < 8 * GIB

    encoder = full_bundle.manifest.graphs["encoder"]
    assert [entry.name for entry in encoder.data] == ["encoder.onnx.data"]
    assert [spec.shape for spec in encoder.outputs] == [
        ["batch", 640, 16, 16],
        ["batch", 1280, 8, 8],
        ["batch", 1280, 4, 4],
    ]
    assert full_bundle.manifest.graphs["vim"].outputs[0].shape == ["batch", 257, 384]
    with Scorer.open(full_bundle.path) as scorer:
        (score,) = scorer.score_batch(parity_images(None, 256, 1).pixels)
    assert 1 < score < 5


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra")
def test_tensorrt_rtx_builds_the_full_graphs_within_8_gib(full_bundle: Bundle) -> None:
    command = [EXPORT, "engines", full_bundle.path, "--backend", "tensorrt-rtx"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stderr)
    opened = Bundle.open(full_bundle.path)
    (engines,) = opened.manifest.engines
    check_plans(opened, engines)
    weights = sum(entry.size for entry in full_bundle.manifest.graphs["encoder"].files())
    assert engines.plans["encoder"].file.size > 0.9 * weights  # they are in the plan, in fp32
    record = json.loads((plans_folder(opened, engines) / "engine.json").read_text())
    assert record["peak_gib"] < 8
