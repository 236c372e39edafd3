"""The real size, with random weights: `sd15-vim-s` is exported, proven and scored within the promised memory."""

from __future__ import annotations

import resource
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mdnet_engines.bundle import Bundle
from mdnet_export.images import parity_images
from mdnet_rt import Scorer

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
GIB = 2**20  # in the KiB that getrusage counts


@pytest.mark.full_size
def test_full_size_is_built_within_8_gib_and_scores(tmp_path: Path) -> None:
    command = [EXPORT, "build", "--preset", "sd15-vim-s", "--random-init", "--num-images", "2", "-o", "bundle"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak memory of the full-size build: {peak / GIB:.2f} GiB")
    assert peak < 8 * GIB

    bundle = Bundle.open(tmp_path / "bundle")
    encoder = bundle.manifest.graphs["encoder"]
    assert [entry.name for entry in encoder.data] == ["encoder.onnx.data"]
    assert [spec.shape for spec in encoder.outputs] == [
        ["batch", 640, 16, 16],
        ["batch", 1280, 8, 8],
        ["batch", 1280, 4, 4],
    ]
    assert bundle.manifest.graphs["vim"].outputs[0].shape == ["batch", 257, 384]
    with Scorer.open(bundle.path) as scorer:
        (score,) = scorer.score_batch(parity_images(None, 256, 1).pixels)
    assert 1 < score < 5
