"""Two forms of a graph on one file of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_export.graphs.cpu_variant import cpu_variant, open_for_cpu, write_variants
from mdnet_export.parity_images import parity_images


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
