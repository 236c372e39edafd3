"""The exported files themselves: what is in them, and that stock tools run them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_evaluator import evaluate

from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
from mdnet.model.config import FUSIONS, preset
from mdnet.model.net import random_mdnet
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, GraphName
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import LIMITS
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_export.graphs import export as graphs

EXPECTED_IO = {
    "encoder": (["image"], ["down_s16", "down_s32", "mid_s64"]),
    "vim": (["image"], ["tokens"]),
    "fusion": (["down_s16", "down_s32", "mid_s64", "tokens"], ["score"]),
}


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_names_and_symbolic_batch(bundle: Bundle, name: GraphName) -> None:
    graph = onnx.load(bundle.graph_path(name)).graph
    assert ([v.name for v in graph.input], [v.name for v in graph.output]) == EXPECTED_IO[name]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert name == "fusion" or graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_every_scan_is_one_node_with_its_body_in_the_file(bundle: Bundle) -> None:
    model = onnx.load(bundle.graph_path("vim"))
    kinds = Counter(node.op_type for node in model.graph.node if node.domain == "mdnet")
    depth = load_checkpoint(demo_checkpoint()).config.vim_depth
    assert kinds == {"SelectiveScan": depth, "SelectiveScanReverse": depth}
    assert {function.name for function in model.functions} == set(kinds)


def test_no_flip_is_left_in_vim(bundle: Bundle) -> None:
    """A flip would be a Slice with a negative step, or a gather of reversed indices."""
    graph = onnx.load(bundle.graph_path("vim")).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"ReverseSequence", "Gather", "GatherND"}
    slices = [node for node in graph.node if node.op_type == "Slice"]
    assert all(len(node.input) < 5 or (constants[node.input[4]] > 0).all() for node in slices)


def test_timestep_and_prompt_are_folded_away(bundle: Bundle) -> None:
    graph = onnx.load(bundle.graph_path("encoder")).graph
    names = " ".join(tensor.name for tensor in graph.initializer)
    assert "time_emb" not in names
    assert "to_k" not in " ".join(name for name in names.split() if "attn2" in name)
    assert not {"Sin", "Cos"} & {node.op_type for node in graph.node}


def test_exponential_of_a_log_is_folded_away(bundle: Bundle) -> None:
    assert "Exp" not in {node.op_type for node in onnx.load(bundle.graph_path("vim")).graph.node}


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_nothing_of_the_exporting_machine_is_in_the_file(bundle: Bundle, name: GraphName) -> None:
    model = onnx.load(bundle.graph_path(name))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes can spell anything
    raw = model.SerializeToString()
    for trace in (b"stack_trace", b".py", str(Path.home()).encode() + b"/", str(Path(__file__).parents[3]).encode()):
        assert trace not in raw


@pytest.mark.parametrize("name", GRAPH_NAMES)
def test_nodes_are_named_by_their_module(bundle: Bundle, name: GraphName) -> None:
    rounding = ("QuantizeLinear", "DequantizeLinear")  # named by the value that they round
    nodes = onnx.load(bundle.graph_path(name)).graph.node
    names = [node.name for node in nodes if node.op_type not in rounding]
    assert sum("/" in node for node in names) > 0.8 * len(names)
    assert name != "fusion" or any(node.startswith("fusion.head.out/") for node in names)


def test_stock_onnx_runtime_gives_pytorchs_scores(bundle: Bundle) -> None:
    """Plain sessions, nothing of ours registered, three batch sizes with one file."""
    model = load_checkpoint(demo_checkpoint())
    sessions = {name: onnxruntime.InferenceSession(bundle.graph_path(name)) for name in GRAPH_NAMES}
    rng = np.random.default_rng(0)
    for batch in (1, 3, 8):
        image = rng.integers(0, 256, (batch, 128, 128, 3), dtype=np.uint8)
        values = {"image": image}
        for session in sessions.values():
            feeds = {value.name: values[value.name] for value in session.get_inputs()}
            values |= dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))
        with torch.no_grad():
            expected = model(torch.from_numpy(image)).numpy()
        limit = LIMITS[bundle.manifest.precision].score_max_abs
        assert np.abs(values["score"] - expected).max() <= limit


def test_vim_gives_the_same_tokens_in_every_host(bundle: Bundle) -> None:
    """One file: ONNX Runtime with nothing of ours and with the native kernels, onnx's own evaluator, and PyTorch."""
    file = bundle.graph_path("vim")
    image = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = load_checkpoint(demo_checkpoint()).vim(torch.from_numpy(image)).numpy()
    feeds = {"image": image}
    tokens = {
        "stock": onnxruntime.InferenceSession(file).run(None, feeds)[0],
        "ours": OrtSession(file).run(feeds)["tokens"],
        "onnx": evaluate(onnx.load(file), feeds)[0],
    }
    limit = 1e-5 if bundle.manifest.precision == "fp32" else 2e-2  # three blocks of float32, or of half, sums
    for host, got in tokens.items():
        assert np.abs(got - expected).max() <= limit * np.abs(expected).max(), host


def test_large_weights_go_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "EXTERNAL_DATA_BYTES", 1000)
    model = load_checkpoint(demo_checkpoint())
    file = graphs.export_graph(model, "fusion", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fusion.onnx", "fusion.onnx.data"]
    assert (tmp_path / "fusion.onnx.data").stat().st_size > 5 * file.stat().st_size / 2
    onnxruntime.InferenceSession(file)


def test_a_batch_fixed_by_python_code_is_caught() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * len(x)

    program = torch.onnx.export(Fixed(), (torch.zeros(2, 3),), dynamo=True, verbose=False)
    assert program is not None
    with pytest.raises(MDNetError, match="fixed the batch"):
        graphs._check_batch_is_symbolic(program.model_proto)


@pytest.mark.parametrize("kind", [kind for kind in FUSIONS if kind != preset("demo").fusion])
def test_every_other_kind_of_fusion_has_the_same_signature_and_pytorchs_scores(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(preset("demo"), fusion=kind)
    model = random_mdnet(config, seed=0)
    file = graphs.export_graph(model, "fusion", tmp_path)
    session = onnxruntime.InferenceSession(file)
    assert [value.name for value in session.get_inputs()] == EXPECTED_IO["fusion"][0]
    for batch in (1, 3):
        features = {name: torch.randn(batch, *shape) for name, shape in config.feature_shapes.items()}
        tokens = torch.randn(batch, config.vim_grid**2 + 1, config.vim_dim)
        with torch.no_grad():
            expected = model.fusion(features, tokens).numpy()
        feeds = {name: tensor.numpy() for name, tensor in {**features, "tokens": tokens}.items()}
        (scores,) = session.run(None, feeds)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)  # float32 in another order
