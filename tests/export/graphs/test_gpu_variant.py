"""A float graph's form for GPUs, on what it shares of its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_export.graphs.cpu_variant import write_variants
from mdnet_export.graphs.gpu_variant import gpu_variant, write_gpu_variant
from mdnet_export.parity_images import parity_images


@pytest.fixture
def vim(float_graphs: Path, tmp_path: Path) -> Path:
    """With its weights in a file of their own."""
    file = tmp_path / "vim.onnx"
    write_variants(onnx.load(float_graphs / "vim.onnx"), file)
    return file


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_vim_for_gpus_computes_the_same_and_stores_only_what_is_half(vim: Path) -> None:
    before = sizes(vim.parent)
    for _ in range(2):  # the second leaves nothing of the first
        write_gpu_variant(vim)
    after = sizes(vim.parent)
    assert after.keys() - before.keys() == {"vim.gpu.onnx", "vim.gpu.onnx.data"}
    assert before.items() <= after.items()
    assert after["vim.gpu.onnx.data"] < 0.6 * before["vim.onnx.data"]
    feeds = {"image": parity_images(None, 128, 2).pixels}
    plain, half = (OrtSession(file).run(feeds)["tokens"] for file in (vim, gpu_variant(vim)))
    assert 0 < np.linalg.norm(plain - half) < 2e-3 * np.linalg.norm(plain)


def test_it_says_where_all_its_weights_are(vim: Path, tmp_path: Path) -> None:
    """Moved with both files it runs; TensorRT's parser and ONNX Runtime look for weights next to the graph."""
    write_gpu_variant(vim)
    light = onnx.load(gpu_variant(vim), load_external_data=False)
    named = {each.value for t in light.graph.initializer for each in t.external_data if each.key == "location"}
    assert named == {"vim.onnx.data", "vim.gpu.onnx.data"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (gpu_variant(vim).name, *named):
        shutil.copy(vim.parent / name, elsewhere)
    assert OrtSession(elsewhere / gpu_variant(vim).name).outputs == ("tokens",)
