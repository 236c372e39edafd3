"""On a CUDA GPU: the demo bundle's plans give ONNX Runtime's outputs, alone, in a chain and as CUDA graphs."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdnet_engines.backends.candidates import Choice, open_choice
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange, PlanRuntime
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.session import run_graphs
from mdnet_engines.tensorrt.plan_process import build_plans, probe
from mdnet_engines.tensorrt.plans import Host, plan_path
from mdnet_engines.tensorrt.session import TensorRTSessions

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-3  # of the largest output; the fp32 gate's 60 dB. TF32 is off in an fp32 bundle's plans


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, values in got.items():
        assert values.shape == expected[name].shape, name
        np.testing.assert_allclose(
            values, expected[name], rtol=0, atol=TOLERANCE * np.abs(expected[name]).max(), err_msg=name
        )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    build, images, weights = (
        pytest.importorskip(f"mdnet_export.{name}", reason="needs the [export] extra")
        for name in ("build", "parity_images", "model_source")
    )
    folder: Path = tmp_path_factory.mktemp("bundle") / "demo"
    pixels = images.parity_images(None, 128, 6)
    return build.build_bundle(weights.choose_weights(), folder, precision="fp32", images=pixels)


def host_of(runtime: PlanRuntime) -> Host:
    host = probe(runtime)
    if host.problem or host.gpu is None:
        pytest.skip(host.problem or "TensorRT sees no GPU")
    if runtime == "tensorrt-rtx" and host.gpu.sm not in host.targets:
        pytest.skip(f"TensorRT-RTX does not run on {host.gpu.name}")
    return host


OPTIONS: dict[str, dict[str, Any]] = {
    "three profiles": {"batch": BatchRange(minimum=1, optimum=1, further_optima=[4, 8], maximum=8)},
    "stripped": {"stripped": True},
    "compatible": {"compatible": True},
    "level": {"level": 5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_plans_of_every_option_give_the_scores_of_onnx_runtime(
    bundle: Bundle, runtime: PlanRuntime, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_of(runtime)
    if runtime == "tensorrt-rtx" and {"compatible", "level"} & options.keys():
        pytest.skip("TensorRT-RTX has no such option")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    built = build_plans(Bundle.open(folder), host, **options)
    reference = {name: OrtSession(bundle.graph_path(name)) for name in GRAPH_NAMES}
    size = bundle.manifest.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (7, size, size, 3), np.uint8)
    expected = run_graphs(reference, images)["score"]
    choice = Choice(dict.fromkeys(GRAPH_NAMES, runtime), built.engines)
    for _ in range(2):  # TensorRT-RTX finds its kernels at the second start
        graphs = open_choice(built.bundle, choice)
        try:
            for rows in (1, 3, 7, 7, 3, 1, 7):
                assert_close({"score": graphs.score(images[:rows])}, {"score": expected[:rows]})
        finally:
            graphs.close()
    kept = list((tmp_path / "mdnet" / "tensorrt-rtx").glob("*.kernels"))
    assert len(kept) == (runtime == "tensorrt-rtx")


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_plans_give_the_outputs_of_onnx_runtime(bundle: Bundle, runtime: PlanRuntime) -> None:
    built = build_plans(bundle, host_of(runtime))
    reference = {name: OrtSession(bundle.graph_path(name)) for name in GRAPH_NAMES}
    size, most = bundle.manifest.preprocessing.image_size, min(8, built.engines.batch.maximum)
    random = np.random.default_rng(0)
    batches = [random.integers(0, 256, (n, size, size, 3), np.uint8) for n in (1, 3, most, most + 1, 1, 3, most, 3)]
    expected = [run_graphs(reference, batch) for batch in batches]
    plans = {name: plan_path(built.bundle, built.engines, name) for name in GRAPH_NAMES}
    with TensorRTSessions(plans, runtime=runtime, max_batch=most) as sessions:

        def run() -> None:
            for batch, outputs in zip(batches, expected, strict=True):
                assert_close(sessions.run(batch, all_outputs=True), outputs)
                assert_close(run_graphs(sessions.graphs, batch), outputs)

        run()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(run) for _ in range(2)]:
                done.result()
