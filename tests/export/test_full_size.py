"""The real size, with random weights: `sd15-vim-s` is exported, proven, scored and built within the promised memory."""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mdnet_engines.bundle import Bundle
from mdnet_engines.manifest import GRAPH_NAMES
from mdnet_export.images import parity_images
from mdnet_rt import Scorer

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
RTX_BUILD = Path(__file__).parents[1] / "support" / "rtx_build.py"
GIB = 2**20  # in the KiB that getrusage counts

pytestmark = pytest.mark.full_size


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
def test_tensorrt_rtx_builds_the_full_graphs(full_bundle: Bundle) -> None:
    files = [full_bundle.graph_path(name) for name in GRAPH_NAMES]
    result = subprocess.run([sys.executable, RTX_BUILD, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert len(result.stdout.splitlines()) == len(files)
