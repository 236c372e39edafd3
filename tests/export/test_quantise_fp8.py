"""The packaged demo in fp8: what is in the bundle, and what the budget does."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from recorded import Recorded

from mdnet_calib.calibration_set import MIN_IMAGES, CalibrationSet
from mdnet_calib.passes import fp8
from mdnet_calib.sensitivity import Budget, block_of
from mdnet_engines.backends.choice import choose
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES
from mdnet_engines.errors import MDNetError
from mdnet_engines.parity.gates import LIMITS
from mdnet_export import rewrite as rewrite_module
from mdnet_export.parity_images import calibration_images, parity_images
from mdnet_export.quantise import Calibration, quantise_encoder_fp8
from mdnet_export.rewrite import FLOAT32_MODULES, rewrite
from mdnet_rt import Scorer

FEW_BLOCKS = ("vae.mid_block.resnets.0.", "vae.mid_block.resnets.1.", "unet.down_blocks.1.downsamplers.0.")
E4M3 = onnx.TensorProto.FLOAT8E4M3FN
PRODUCTS = ("Conv", "MatMul", "Gemm")


@pytest.fixture
def fp8_bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["fp8"]


@pytest.fixture(scope="module")
def few() -> CalibrationSet:
    return calibration_images(None, 128, MIN_IMAGES)


@pytest.fixture
def folder(float_graphs: Path, tmp_path: Path) -> Path:
    """Float graphs to quantise, in a folder that may be changed."""
    return Path(shutil.copytree(float_graphs, tmp_path / "bundle"))


@pytest.fixture
def three_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only three ResNet blocks are there to choose from, so that trying each is quick."""
    every = fp8.fp8_nodes
    monkeypatch.setattr(fp8, "fp8_nodes", lambda proto: [name for name in every(proto) if name.startswith(FEW_BLOCKS)])


def quantised(file: Path) -> set[str]:
    """Names of the convolutions and products both of whose factors come from FP8."""
    graph = onnx.load(file).graph
    of_type = {tensor.name: tensor.data_type for tensor in graph.initializer}
    from_fp8 = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and of_type[node.input[2]] == E4M3
    }
    return {node.name for node in graph.node if node.op_type in PRODUCTS and from_fp8 >= set(node.input[:2])}


def test_the_manifest_says_how_fp8_came_about(fp8_bundle: Bundle) -> None:
    manifest = Bundle.open(fp8_bundle.path).manifest
    assert {name: graph.precision for name, graph in manifest.graphs.items()} == {
        "encoder": "fp8",
        "vim": "fp16",
        "fusion": "fp16",
    }
    assert manifest.calibration is not None
    assert (manifest.calibration.images, manifest.calibration.method) == (16, "minmax")
    assert manifest.fp8 is not None
    assert set(manifest.fp8.fp8_blocks) == {block_of(node) for node in quantised(fp8_bundle.graph_path("encoder"))}
    assert len(manifest.fp8.fp8_blocks) > 10
    assert manifest.fp8.float_blocks == []
    assert manifest.int8 is None
    page = (fp8_bundle.path / "parity.html").read_text()
    for part in (
        "16 images, 16 drawn faces, ranges by minmax",
        "blocks of the encoder",
        "budget on calibration images",
    ):
        assert part in page


def test_what_is_not_fp8_is_half(fp8_bundle: Bundle) -> None:
    for name in GRAPH_NAMES:
        graph = onnx.load(fp8_bundle.graph_path(name)).graph
        stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        products = [node for node in graph.node if node.op_type in PRODUCTS and node.input[1] in stored]
        for node in products:
            assert node.name.startswith(FLOAT32_MODULES) or stored[node.input[1]] == onnx.TensorProto.FLOAT16, node.name
        scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        assert {stored[scale] for scale in scales} <= {onnx.TensorProto.FLOAT16}


def test_a_run_on_a_cpu_gives_the_scores_and_says_that_fp8_is_for_gpus(
    fp8_bundle: Bundle, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mdnet_engines.sessions.onnxruntime.has_cuda", lambda: False)
    with caplog.at_level(logging.WARNING, "mdnet_engines"):
        choice = choose(fp8_bundle)
    assert not choice.on_gpu
    assert "which is for GPUs that multiply in FP8" in caplog.text
    pixels = parity_images(None, 128, 6).pixels
    with Scorer.open(fp8_bundle.path, backend="onnxruntime-cpu") as scorer:
        scores = scorer.score_batch(pixels)
    built = fp8_bundle.manifest.parity
    assert built.passed
    assert built.max_abs is not None
    assert 0 < built.max_abs <= LIMITS["fp8"].score_max_abs
    assert np.isfinite(scores).all()


@pytest.mark.usefixtures("three_blocks")
def test_blocks_that_break_the_budget_stay_float16(few: CalibrationSet, folder: Path, tmp_path: Path) -> None:
    loose = Path(shutil.copytree(folder, tmp_path / "loose"))
    limit = 0.9 * quantise_encoder_fp8(loose, Calibration(few, budget=Budget(9, 0))).facts().drift_max_abs
    progress = Recorded()
    made = rewrite(folder, "fp8", Calibration(few, budget=Budget(limit, 0)), progress=progress)
    assert made.fp8 is not None
    facts = made.fp8.facts()
    assert facts.float_blocks
    assert facts.drift_max_abs <= limit
    assert sorted(facts.fp8_blocks + facts.float_blocks) == sorted(block.rstrip(".") for block in FEW_BLOCKS)
    assert {block_of(node) for node in quantised(folder / "encoder.onnx")} == set(facts.fp8_blocks)
    assert all(f"kept in float: {block}" in made.for_people() for block in facts.float_blocks)
    assert sum("fp8 in block" in step for step in progress.steps) == 3
    # Only the float graphs' names: nothing is left of what was tried.
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.onnx" for name in sorted(GRAPH_NAMES)]


@pytest.mark.usefixtures("three_blocks")
def test_a_budget_that_nothing_meets_is_said(few: CalibrationSet, folder: Path) -> None:
    before = (folder / "encoder.onnx").read_bytes()
    with pytest.raises(MDNetError, match=r"^no block of the encoder can be fp8: .* or take --precision fp16$"):
        quantise_encoder_fp8(folder, Calibration(few, budget=Budget(1e-9, 0)))
    assert (folder / "encoder.onnx").read_bytes() == before


@pytest.mark.usefixtures("three_blocks")
def test_values_that_overflow_float16_stay_float32_in_fp8_too(
    few: CalibrationSet, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "unet.down_blocks.1.downsamplers.0.conv"
    graph = onnx.load(folder / "encoder.onnx").graph
    (large,) = (node.output[0] for node in graph.node if node.name.startswith(name) and node.op_type == "Conv")
    monkeypatch.setattr(
        rewrite_module, "near_overflow", lambda proto, *_, **__: [large] if large in str(proto.graph.node) else []
    )
    made = rewrite(folder, "fp8", Calibration(few, budget=Budget(9, 0)))
    assert made.float32_values == {"encoder": [large]}
    model = onnx.load(folder / "encoder.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    assert types[large] == onnx.TensorProto.FLOAT
