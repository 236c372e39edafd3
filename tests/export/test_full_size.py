"""The real size, with random weights: `sd15-vim-s` is exported, proven, scored and built within the promised memory."""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sysconfig
from pathlib import Path

import onnx
import pytest

from mdnet_calib.passes import fp8, int8
from mdnet_calib.passes.fp16 import to_fp16
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES
from mdnet_engines.tensorrt.plans import check_plans, plans_folder
from mdnet_export.build import graph_entry
from mdnet_export.graphs.cpu_variant import write_variants
from mdnet_export.graphs.export import save_graph
from mdnet_export.graphs.gpu_variant import write_gpu_variant
from mdnet_export.parity_images import parity_images
from mdnet_export.rewrite import FLOAT32_MODULES
from mdnet_rt import Scorer

EXPORT = Path(sysconfig.get_path("scripts"), "mdnet-export")
GIB = 2**20  # in the KiB that getrusage counts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    work = tmp_path_factory.mktemp("full")
    command = [EXPORT, "build", "--preset", "sd15-vim-s", "--random-init", "--num-images", "2", "-o", "bundle"]
    result = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Bundle.open(work / "bundle")


def test_full_size_is_built_within_8_gib_and_scores(full_bundle: Bundle) -> None:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"peak memory of the full-size build: {peak / GIB:.2f} GiB")
    assert peak < 8 * GIB

    encoder = full_bundle.manifest.graphs["encoder"]
    assert [entry.name for entry in encoder.data] == ["encoder.onnx.data"]
    assert [spec.shape for spec in encoder.outputs] == [
        ["batch", 640, 16, 16],
        ["batch", 1280, 8, 8],
        ["batch", 1280, 4, 4],
    ]
    assert full_bundle.manifest.graphs["vim"].outputs[0].shape == ["batch", 257, 384]
    with Scorer.open(full_bundle.path) as scorer:
        (score,) = scorer.score_batch(parity_images(None, 256, 1).pixels)
    assert 1 < score < 5


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra")
def test_tensorrt_rtx_builds_the_full_graphs_within_8_gib(full_bundle: Bundle) -> None:
    command = [EXPORT, "engines", full_bundle.path, "--backend", "tensorrt-rtx"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stderr)
    opened = Bundle.open(full_bundle.path)
    (engines,) = opened.manifest.engines
    check_plans(opened, engines)
    weights = sum(entry.size for entry in full_bundle.manifest.graphs["encoder"].files())
    assert engines.plans["encoder"].file.size > 0.9 * weights  # they are in the plan, in fp32
    record = json.loads((plans_folder(opened, engines) / "engine.json").read_text())
    assert record["peak_gib"] < 8


@pytest.fixture(params=["int8", "fp8"])
def quantised_bundle(request: pytest.FixtureRequest, full_bundle: Bundle, tmp_path: Path) -> Bundle:
    """All blocks quantised, by made-up ranges: a plan's size and the memory to build it do not depend on them."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in GRAPH_NAMES:
        proto, file = onnx.load(full_bundle.graph_path(name)), folder / f"{name}.onnx"
        if request.param == "int8":
            nodes = int8.int8_nodes(proto) if name == "encoder" else []
            write_variants(int8.to_int8(proto, dict.fromkeys(int8.activations(proto, nodes), 10.0), nodes), file)
            write_gpu_variant(file, keep=FLOAT32_MODULES)
        else:
            nodes = fp8.fp8_nodes(proto) if name == "encoder" else []
            quantised = fp8.to_fp8(proto, dict.fromkeys(fp8.activations(proto, nodes), 10.0), nodes)
            save_graph(to_fp16(quantised, keep=FLOAT32_MODULES), file)
    graphs = {name: graph_entry(folder / f"{name}.onnx", request.param) for name in GRAPH_NAMES}
    assert full_bundle.manifest.probes is not None
    shutil.copy(full_bundle.path / full_bundle.manifest.probes.name, folder)
    changes = {"precision": request.param, "graphs": graphs, "reports": [], "engines": []}
    manifest = full_bundle.manifest.model_copy(update=changes)
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return Bundle.open(folder)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the [rtx] extra")
def test_tensorrt_rtx_builds_the_full_graphs_that_gpus_get_of_a_quantised_bundle(quantised_bundle: Bundle) -> None:
    """Of int8 with float16 around it, and of fp8, within 9 GiB."""
    command = [EXPORT, "engines", quantised_bundle.path, "--backend", "tensorrt-rtx", "--gpu", "sm_89,sm_120"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stderr)
    opened = Bundle.open(quantised_bundle.path)
    (engines,) = opened.manifest.engines
    check_plans(opened, engines)
    folder = plans_folder(opened, engines)
    assert json.loads((folder / "engine.json").read_text())["peak_gib"] < 9
    layers = json.loads((folder / "layers.json").read_text())["graphs"]
    outputs = {
        name: {layer["outputs"][0].split()[0] for layer in layers[name] if layer["type"] in ("CONVOLUTION", "QUANTIZE")}
        for name in layers
    }
    quantised = {"int8": "INT8", "fp8": "FP8"}[opened.manifest.precision]
    assert outputs["encoder"] == {quantised, "HALF"}
    assert outputs["vim"] == {"HALF"}
