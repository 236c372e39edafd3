"""Where a rewritten graph leaves the float graph: the layer that was spoiled is the first that is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mdnet_calib.passes.fp16 import to_fp16
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.measure import first_diverging
from mdnet_engines.parity.report import LayerParity, TensorParity
from mdnet_export.graphs.export import save_graph
from mdnet_export.layers import compare_layers
from mdnet_export.parity_images import parity_images


@pytest.fixture(scope="module")
def feed() -> dict[str, np.ndarray]:
    return {"image": parity_images(None, 128, 1).pixels}


def spoiled(file: Path, layer: str, folder: Path) -> Path:
    """A copy of the graph with the first weight of `layer` doubled."""
    proto = onnx.load(file)
    node = next(node for node in proto.graph.node if node.name.startswith(f"{layer}/"))
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name in node.input)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    return save_graph(proto, folder / file.name)


def test_a_graph_against_itself_differs_nowhere(float_graphs: Path, feed: dict[str, np.ndarray]) -> None:
    layers = compare_layers(float_graphs / "vim.onnx", float_graphs / "vim.onnx", feed)
    assert {layer.parity.max_abs for layer in layers} == {0.0}
    assert layers[0].layer == "vim.patch_embed.proj"
    assert layers[-1].layer == "vim.norm_f"


@pytest.mark.parametrize("layer", ["vae.down_blocks.1.resnets.0.conv1", "unet.down_blocks.1.resnets.0.conv2"])
def test_the_layer_that_was_spoiled_is_the_first_that_diverges(
    layer: str, float_graphs: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    reference = float_graphs / "encoder.onnx"
    layers = compare_layers(reference, spoiled(reference, layer, tmp_path), feed)
    first = first_diverging(layers, "fp32")
    assert first is not None
    assert first.layer == layer
    position = layers.index(first)
    assert {part.parity.max_abs for part in layers[:position]} == {0.0}


def test_the_layers_of_an_fp16_graph_are_those_of_the_float_graph(
    float_graphs: Path, feed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    half = save_graph(to_fp16(onnx.load(float_graphs / "encoder.onnx")), tmp_path / "encoder.onnx")
    names = [part.layer for part in compare_layers(float_graphs / "encoder.onnx", float_graphs / "encoder.onnx", feed)]
    layers = compare_layers(float_graphs / "encoder.onnx", half, feed)
    assert [part.layer for part in layers] == names
    assert all(part.parity.snr_db > 35 for part in layers)  # what an output of an fp16 graph must have
    assert any(part.parity.max_abs > 0 for part in layers)


def test_graphs_of_different_models_are_refused(float_graphs: Path, feed: dict[str, np.ndarray]) -> None:
    with pytest.raises(MDNetError, match=r"encoder\.onnx and fusion\.onnx have no layer in common"):
        compare_layers(float_graphs / "encoder.onnx", float_graphs / "fusion.onnx", feed)


def test_a_value_that_is_not_finite_diverges() -> None:
    good, bad = TensorParity(1.0, 80.0, 0.0), TensorParity(np.nan, np.nan, np.nan)
    layers = [LayerParity("a", "x", good), LayerParity("b", "y", bad)]
    assert first_diverging(layers, "fp32") is layers[1]
    assert first_diverging(layers[:1], "fp32") is None
