"""Two forms of a graph on one file of weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from mdnet.model.config import preset
from mdnet.model.net import random_mdnet
from mdnet_engines.bundle.manifest import GraphEntry
from mdnet_engines.ops import native
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_export.build import graph_entry
from mdnet_export.graphs.cpu_variant import (
    add_exact_variant,
    cpu_variant,
    open_for_cpu,
    winograd_convolutions,
    write_variants,
)
from mdnet_export.graphs.export import export_graph
from mdnet_export.parity_images import parity_images
from mdnet_export.rewrite import rewrite


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 encoder with ResNet blocks of 40 to 56 channels, at 128 to 32 pixels; not to be changed."""
    config = dataclasses.replace(preset("demo"), vae_channels=(40, 40, 56, 64))
    return export_graph(random_mdnet(config, seed=0), "encoder", tmp_path_factory.mktemp("wide"))


def locations(file: Path) -> set[str]:
    light = onnx.load(file, load_external_data=False)
    return {each.value for t in light.graph.initializer for each in t.external_data if each.key == "location"}


def test_both_forms_of_vim_are_on_one_file_and_compute_the_same(float_graphs: Path, tmp_path: Path) -> None:
    file = tmp_path / "vim.onnx"
    for _ in range(2):  # the second leaves nothing of the first
        write_variants(onnx.load(float_graphs / "vim.onnx"), file)
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"vim.onnx", "vim.cpu.onnx", "vim.onnx.data"}
    weights = onnx.load(float_graphs / "vim.onnx").graph.initializer
    assert sizes["vim.onnx.data"] < 1.3 * sum(len(tensor.raw_data) for tensor in weights)
    assert locations(file) == locations(cpu_variant(file)) == {"vim.onnx.data"}
    feeds = {"image": parity_images(None, 128, 2).pixels}
    plain, cpu = OrtSession(file).run(feeds)["tokens"], open_for_cpu(tmp_path, "vim").run(feeds)["tokens"]
    assert np.linalg.norm(plain - cpu) < 0.01 * np.linalg.norm(plain)


def test_a_graph_without_a_form_for_the_cpu_is_opened_as_it_is(float_graphs: Path) -> None:
    assert not cpu_variant(float_graphs / "fusion.onnx").exists()
    assert open_for_cpu(float_graphs, "fusion").outputs == ("score",)


@pytest.mark.parametrize("registered", [True, False])
def test_a_float32_encoder_computes_the_same_in_both_forms(
    wide: Path, tmp_path: Path, registered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within float32's rounding, with our operators and by their function bodies, for any number of images."""
    file = Path(shutil.copy(wide, tmp_path))
    add_exact_variant(file)
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.onnx", "encoder.cpu.onnx", "encoder.onnx.data"}
    assert locations(file) == locations(cpu_variant(file)) == {"encoder.onnx.data"}
    if not registered:
        monkeypatch.setattr(native, "custom_op_library", lambda: None)
    elif native.custom_op_library() is None:
        pytest.skip("installed without its native library")
    pixels = parity_images(None, 128, 3).pixels
    for images in (pixels[:1], pixels):
        plain, cpu = OrtSession(wide).run({"image": images}), open_for_cpu(tmp_path, "encoder").run({"image": images})
        for name, expected in plain.items():
            assert np.linalg.norm(cpu[name] - expected) < 1e-5 * np.linalg.norm(expected), name


def test_the_convolutions_by_winograd_are_known_by_their_modules(wide: Path, tmp_path: Path) -> None:
    """Those of at least 32 x 32 places; their layers have the names of the other form's."""
    file = Path(shutil.copy(wide, tmp_path))
    add_exact_variant(file)
    blocks = [f"vae.down_blocks.{level}.resnets.0.conv" for level in range(3)]
    layers = [node.name.partition("/")[0] for node in winograd_convolutions(cpu_variant(file))]
    assert layers == [f"{block}{number}" for block in blocks for number in (1, 2)]
    assert winograd_convolutions(file) == []


def test_an_fp32_encoder_gets_a_form_for_the_cpu_where_it_gains_by_that(
    wide: Path, float_graphs: Path, tmp_path: Path
) -> None:
    def rewritten(encoder: Path, folder: Path) -> GraphEntry:
        folder.mkdir()
        shutil.copy(encoder, folder)
        rewrite(folder, "fp32", None)
        return graph_entry(folder / "encoder.onnx", "fp32")

    entry = rewritten(wide, tmp_path / "wide")
    assert [file.name for file in entry.files()] == ["encoder.onnx", "encoder.onnx.data", "encoder.cpu.onnx"]
    entry = rewritten(float_graphs / "encoder.onnx", tmp_path / "demo")
    assert [file.name for file in entry.files()] == ["encoder.onnx"]
