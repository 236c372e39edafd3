"""Where a bundle's graph leaves the float graph: every layer's values side by side, in the order they are computed.

The rewrites to fp16 and int8 keep the names of values and nodes, so a layer of the one graph is found in the other. A
layer is a module of the PyTorch model; its value is what its last node gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto

from mdnet_engines.errors import MDNetError, require
from mdnet_engines.parity.report import LayerParity, TensorParity
from mdnet_engines.sessions.onnxruntime import OrtSession

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def compare_layers(reference: Path, graph: Path, feed: Mapping[str, np.ndarray]) -> list[LayerParity]:
    """Run two variants of one graph on `feed` and compare them layer by layer, in the order of computation.

    Args:
        reference: the float32 ONNX file.
        graph: its rewritten variant.
        feed: the graph's inputs, one image.

    Raises:
        MDNetError: polygraphy is missing, or the graphs share no layer: they are not of one model.
    """
    require("polygraphy", "export")
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, SimpleCompareFunc, SnrCompareFunc
    from polygraphy.logger import G_LOGGER

    layers = _shared_layers(reference, graph)
    if not layers:
        raise MDNetError(f"{reference.name} and {graph.name} have no layer in common; are they from the same model?")
    order = list(layers.values())
    with (
        TemporaryDirectory(prefix="mdnet-layers-") as name,
        G_LOGGER.verbosity(G_LOGGER.CRITICAL),
        np.errstate(all="ignore"),
    ):
        folder = Path(name)
        marked = {
            label: _marked(file, order, folder / f"{label}.onnx")
            for label, file in (("reference", reference), ("bundle", graph))
        }
        # Our session, since polygraphy's own can't register the native scan; one at a time is open.
        runners = [OnnxrtRunner(lambda f=file: OrtSession(f).session, name=label) for label, file in marked.items()]
        inputs = onnx.load(marked["reference"], load_external_data=False).graph.input
        results = Comparator.run(runners, data_loader=[{value.name: feed[value.name] for value in inputs}])
        measures = [CosineSimilarityCompareFunc(), SnrCompareFunc(), SimpleCompareFunc()]
        compared = Comparator.compare_accuracy(results, compare_func=measures)
    cosine, snr, simple = (next(iter(of_runners.values()))[0] for of_runners in compared)
    return [
        LayerParity(
            layer, value, TensorParity(cosine[value].cosine_similarity, snr[value].snr, simple[value].max_absdiff)
        )
        for layer, value in layers.items()
    ]


def _shared_layers(reference: Path, graph: Path) -> dict[str, str]:
    """Layer → its value, for those that both graphs have with a float value, in the order of `reference`."""
    there, here = (onnx.load(file, load_external_data=False) for file in (reference, graph))
    layers, values = {_layer(node) for node in here.graph.node} - {""}, set(_floats(there)) & set(_floats(here))
    # A rewrite may put a cast behind a layer's last node: layer and value are looked up each by itself.
    shared: dict[str, str] = {}
    for node in there.graph.node:
        layer, value = _layer(node), node.output[0]
        if layer in layers and value in values:
            shared.pop(layer, None)  # a layer stands where its last value is computed
            shared[layer] = value
    return shared


def _layer(node: onnx.NodeProto) -> str:
    """The module that a node belongs to; empty where its name tells none."""
    return node.name.rpartition("/")[0]


def _floats(proto: onnx.ModelProto) -> list[str]:
    typed = (*proto.graph.value_info, *proto.graph.output)
    return [value.name for value in typed if value.type.tensor_type.elem_type in _FLOATS]


def _marked(source: Path, values: list[str], file: Path) -> Path:
    """Write the graph with `values` as its outputs."""
    from polygraphy.backend.onnx import modify_outputs, save_onnx

    save_onnx(modify_outputs(onnx.load(source), values), str(file), external_data_path=f"{file.name}.data")
    return file
