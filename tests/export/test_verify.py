"""`verify`: against the weights or another bundle, on any backend, with the layers where a gate fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.bundle.manifest import MANIFEST_NAME
from mdnet_engines.errors import UsageError
from mdnet_export.cli.main import main
from mdnet_export.verify import verify_bundle


def with_spoiled_layer(bundle: Bundle, layer: str, folder: Path) -> Path:
    """A copy of an fp32 bundle, its manifest in order, with one weight of the encoder scaled."""
    shutil.copytree(bundle.path, folder)
    file = folder / "encoder.onnx"
    proto = onnx.load(file)
    node = next(node for node in proto.graph.node if node.name.startswith(f"{layer}/"))
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name in node.input)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 3, weight.name))
    onnx.save(proto, file)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["graphs"]["encoder"]["file"] = file_entry(file).model_dump()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def test_a_bundle_is_held_against_another_bundle(bundles: dict[str, Bundle]) -> None:
    report = verify_bundle(bundles["fp16"].path, against=bundles["fp32"].path, num_images=3)
    assert report.passed
    fp32 = bundles["fp32"].path
    same = verify_bundle(fp32, against=fp32, backend="onnxruntime-cpu", num_images=3)
    assert all(pair.delta == 0 for pair in same.scores)


@pytest.mark.usefixtures("exported_before")
def test_a_failed_gate_names_the_first_layer_that_diverges(demo_bundle: Bundle, tmp_path: Path) -> None:
    layer = "unet.down_blocks.1.resnets.0.conv1"
    broken = with_spoiled_layer(demo_bundle, layer, tmp_path / "broken")
    arguments = ["verify", str(broken), "--num-images", "2", "-o", str(tmp_path / "proof")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"encoder: the first layer below 60 dB is {layer}" in result.stderr
    assert "vim: no layer is below 60 dB" in result.stderr
    page = (tmp_path / "proof" / "parity.html").read_text(encoding="utf-8")
    assert f"The first with less than 60 dB: <b>{layer}</b>" in page
    assert page.count("data:image/jpeg;base64,") == 2  # the images that differ most
    document = json.loads((tmp_path / "proof" / "parity.json").read_text())
    assert layer in [part["layer"] for part in document["layers"]["encoder"]]


def test_no_layers_are_compared_unless_asked_for(demo_bundle: Bundle) -> None:
    assert verify_bundle(demo_bundle.path, num_images=2).layers == {}
    report = verify_bundle(demo_bundle.path, num_images=2, layers=True)
    assert list(report.layers) == ["encoder", "vim", "fusion"]
    worst = min(part.parity.snr_db for parts in report.layers.values() for part in parts)
    assert np.isinf(worst)  # the same graph, exported again


def test_what_is_neither_checkpoint_nor_bundle_is_refused(demo_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a checkpoint nor a bundle"):
        verify_bundle(demo_bundle.path, against=tmp_path)
