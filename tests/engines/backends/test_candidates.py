"""Which backend runs which graph, on machines with and without a GPU or OpenVINO, and the sessions opened for it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_stand_in
import numpy as np
import pytest
from small_bundle import write_small_bundle

from mdnet_engines.backends import candidates as backends
from mdnet_engines.backends.candidates import BACKENDS, Backend, Choice, candidates, named, open_choice
from mdnet_engines.backends.choice import choose, open_graphs
from mdnet_engines.bundle.files import Bundle, file_entry
from mdnet_engines.bundle.manifest import BatchRange, GpuGraph, PlanEntry, PlanSet
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.ops import native
from mdnet_engines.sessions import onnxruntime as session
from mdnet_engines.sessions import openvino as openvino_session
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_engines.sessions.openvino import OpenVINOSession
from mdnet_engines.sessions.session import run_graphs
from mdnet_engines.system import machine
from mdnet_engines.system.gpu import Gpu
from mdnet_engines.tensorrt import plan_process
from mdnet_engines.tensorrt.plans import Host, usable_plans

SIZE = 64
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")

ORT = dict.fromkeys(("encoder", "vim", "fusion"), "onnxruntime-cpu")
CUDA = dict.fromkeys(ORT, "onnxruntime-cuda")
ONNX_BACKENDS: tuple[Backend, ...] = ("onnxruntime-cpu", "onnxruntime-cuda", "openvino", "openvino-bf16")
OPENVINO = {**ORT, "encoder": "openvino", "fusion": "openvino"}
BF16 = {**ORT, "encoder": "openvino-bf16", "fusion": "openvino-bf16"}


@pytest.fixture(params=["fp32", "fp16", "int8", "fp8"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "bundle", precision=request.param))


@pytest.fixture
def fp32(tmp_path: Path) -> Bundle:
    return Bundle.open(write_small_bundle(tmp_path / "fp32"))


@pytest.mark.parametrize(
    ("cuda", "openvino", "expected"),
    [
        (False, False, [ORT]),
        (False, True, [OPENVINO, ORT]),
        (True, False, [CUDA, ORT]),
        (True, True, [CUDA, OPENVINO, ORT]),
    ],
)
def test_auto_may_take_what_the_machine_has(
    cuda: bool,
    openvino: bool,
    expected: list[dict[str, str]],
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order of speed, with Vim never on OpenVINO; and never in bf16, whatever the bundle's precision."""
    monkeypatch.setattr(session, "has_cuda", lambda: cuda)
    monkeypatch.setattr(openvino_session, "is_installed", lambda: openvino)
    if bundle.manifest.precision == "int8":  # for which ONNX Runtime has our operators
        expected = [each for each in expected if each != OPENVINO]
        expected += [OPENVINO] if openvino else []
    found = candidates(bundle)
    assert [choice.graphs for choice in found] == expected
    assert list(found[0].graphs) == ["encoder", "vim", "fusion"]


@pytest.mark.parametrize("machine_has", [False, True])
@pytest.mark.parametrize(
    ("backend", "expected"), [("onnxruntime-cpu", ORT), ("onnxruntime-cuda", CUDA), ("openvino", OPENVINO)]
)
def test_a_named_backend_is_taken_whatever_is_installed(
    backend: Backend, expected: dict[str, str], machine_has: bool, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "has_cuda", lambda: machine_has)
    monkeypatch.setattr(openvino_session, "is_installed", lambda: machine_has)
    assert named(bundle, backend).graphs == expected


def test_bf16_is_not_for_fp32_bundles(bundle: Bundle) -> None:
    if bundle.manifest.precision == "fp32":
        with pytest.raises(UsageError, match="use the backend openvino"):
            named(bundle, "openvino-bf16")
    else:
        assert named(bundle, "openvino-bf16").graphs == BF16


def test_an_unknown_backend_is_bad_usage_and_names_the_known(fp32: Bundle) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tpu'") as error:
        named(fp32, "tpu")  # type: ignore[arg-type]
    assert all(backend in str(error.value) for backend in BACKENDS)


@pytest.mark.parametrize(
    ("graphs", "words"),
    [(ORT, "onnxruntime-cpu"), (OPENVINO, "encoder openvino, vim onnxruntime-cpu, fusion openvino")],
)
def test_a_choice_in_words(graphs: Any, words: str) -> None:
    assert str(Choice(graphs)) == words


@pytest.mark.parametrize("backend", ["onnxruntime-cpu", pytest.param("openvino", marks=needs_openvino), "auto"])
def test_the_graphs_that_are_opened_give_the_bundles_outputs(backend: Backend, fp32: Bundle) -> None:
    graphs = open_graphs(fp32, backend=backend, threads=1)
    expected = {"onnxruntime-cpu": OrtSession, "onnxruntime-cuda": OrtSession, "openvino": OpenVINOSession}
    assert {name: type(graph) for name, graph in graphs.items()} == {
        name: expected[chosen] for name, chosen in choose(fp32, backend, threads=1).graphs.items()
    }
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    outputs = run_graphs(graphs, images)
    colours = images.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(outputs["down"], colours, rtol=1e-5)  # sums of 4096 bytes in float32
    np.testing.assert_allclose(outputs["tokens"], -colours, rtol=1e-5)
    np.testing.assert_allclose(outputs["score"], np.zeros(3), atol=1e-3)


@pytest.mark.parametrize(("features", "refused"), [(["avx2"], True), (["avx2", "avx512_vnni"], False), ([], False)])
def test_old_int8_weights_are_refused_where_they_saturate(
    features: list[str], refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of schema version 1 have 8 bits: on x86 without VNNI their products overflow 16 bits."""
    folder = write_small_bundle(tmp_path / "old", precision="int8")
    document = json.loads((folder / "manifest.json").read_text())
    del document["probes"]
    (folder / "manifest.json").write_text(json.dumps({**document, "schema_version": 1}))
    here = machine.this_machine().model_copy(update={"features": features})
    monkeypatch.setattr(machine, "this_machine", lambda: here)
    if not refused:
        open_graphs(Bundle.open(folder), backend="onnxruntime-cpu")
        return
    with pytest.raises(MDNetError, match=r"int8 weights of 8 bits.*build it again") as error:
        open_graphs(Bundle.open(folder), backend="onnxruntime-cpu")
    assert len(str(error.value).splitlines()) == 1


class Opened:
    """Stands in for a session; keeps how it was opened."""

    def __init__(self, path: Path, **options: Any):
        self.call = (path.name, options)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "OrtSession", Opened)
    monkeypatch.setattr(backends, "OpenVINOSession", Opened)


@pytest.mark.usefixtures("opened")
def test_sessions_are_opened_as_the_choice_says(tmp_path: Path) -> None:
    bundle = Bundle.open(write_small_bundle(tmp_path / "fp16", precision="fp16"))
    ort = {"backend": "onnxruntime-cpu", "threads": 3, "tf32": False, "profile": None}
    cuda = {**ort, "backend": "onnxruntime-cuda", "tf32": True}
    calls = {
        backend: {name: graph.call for name, graph in open_choice(bundle, named(bundle, backend), threads=3).items()}  # type: ignore[attr-defined]
        for backend in ONNX_BACKENDS
    }
    assert calls == {
        "onnxruntime-cpu": {name: (f"{name}.onnx", ort) for name in ORT},
        "onnxruntime-cuda": {name: (f"{name}.onnx", cuda) for name in ORT},
        "openvino": {
            "encoder": ("encoder.onnx", {"threads": 3}),
            "vim": ("vim.onnx", ort),
            "fusion": ("fusion.onnx", {"threads": 3}),
        },
        "openvino-bf16": {
            "encoder": ("encoder.onnx", {"threads": 3, "arithmetic": "bf16"}),
            "vim": ("vim.onnx", ort),
            "fusion": ("fusion.onnx", {"threads": 3, "arithmetic": "bf16"}),
        },
    }


@pytest.mark.usefixtures("opened")
def test_only_bundles_that_are_not_the_reference_may_round_to_tf32(bundle: Bundle) -> None:
    options = [graph.call[1] for graph in open_choice(bundle, named(bundle, "onnxruntime-cuda")).values()]  # type: ignore[attr-defined]
    assert [each["tf32"] for each in options] == [bundle.manifest.precision != "fp32"] * 3


def test_on_cuda_scores_come_from_the_chain_on_the_device(fp32: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened on the CPU provider in place of CUDA's."""
    monkeypatch.setattr(backends, "OrtSession", lambda path, **_: OrtSession(path))
    monkeypatch.setattr(OrtSession, "run", None)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    scores = open_choice(fp32, named(fp32, "onnxruntime-cuda")).score(images)
    assert scores.shape == (3,)


def with_variants(folder: Path) -> Bundle:
    """An int8 bundle whose manifest names variants of the encoder for ONNX Runtime's CPU and for GPUs."""
    bundle = Bundle.open(write_small_bundle(folder, precision="int8"))
    encoder = bundle.manifest.graphs["encoder"]
    graphs = {
        **bundle.manifest.graphs,
        "encoder": encoder.model_copy(
            update={
                "cpu": encoder.file.model_copy(update={"name": "encoder.cpu.onnx"}),
                "gpu": GpuGraph(file=encoder.file.model_copy(update={"name": "encoder.gpu.onnx"})),
            }
        ),
    }
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"graphs": graphs}))


@pytest.mark.parametrize("library", [Path("a library"), None])
def test_an_encoder_with_a_form_for_the_cpu_runs_on_onnxruntime_first_where_our_operators_are(
    library: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the library that form has no advantage."""
    monkeypatch.setattr(session, "has_cuda", lambda: False)
    monkeypatch.setattr(openvino_session, "is_installed", lambda: True)
    monkeypatch.setattr(native, "custom_op_library", lambda: library)
    bundle = with_variants(tmp_path / "bundle")
    bundle = Bundle(bundle.path, bundle.manifest.model_copy(update={"precision": "fp32"}))
    assert [choice.graphs for choice in candidates(bundle)] == ([ORT, OPENVINO] if library else [OPENVINO, ORT])


@pytest.mark.usefixtures("opened")
def test_onnxruntime_on_cpu_and_gpu_takes_the_forms_made_for_it(tmp_path: Path) -> None:
    bundle = with_variants(tmp_path / "int8")
    files = {
        backend: open_choice(bundle, named(bundle, backend))["encoder"].call[0]  # type: ignore[attr-defined]
        for backend in ONNX_BACKENDS
    }
    assert files.pop("onnxruntime-cpu") == "encoder.cpu.onnx"
    assert files.pop("onnxruntime-cuda") == "encoder.gpu.onnx"
    assert set(files.values()) == {"encoder.onnx"}


def with_plans(bundle: Bundle, plans: dict[Any, Path], runtime: Any, maximum: int = 4) -> Bundle:
    """`bundle` with `plans` in its manifest, and on disk where its manifest says."""
    engines = PlanSet(
        runtime=runtime,
        version="11.4.0",
        target="sm_90",
        batch=BatchRange(minimum=1, optimum=2, maximum=maximum),
        plans={
            name: PlanEntry(file=file_entry(plan), graph=bundle.manifest.graphs[name].digest())
            for name, plan in plans.items()
        },
    )
    folder = bundle.path / "engines" / engines.folder
    folder.mkdir(parents=True)
    for plan in plans.values():
        shutil.copy(plan, folder)
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"engines": [engines]}))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """What a probe for TensorRT finds: a GPU of the given compute capability."""

    def found(runtime: Any, sm: str) -> None:
        answer = Host(runtime, "11.4.0", gpu=Gpu("a GPU", sm, "13.0"))
        monkeypatch.setattr(
            plan_process, "probe", lambda asked: answer if asked == runtime else Host(asked, problem="none")
        )

    return found


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_auto_takes_plans_that_fit_this_gpu_and_scores_with_them(
    runtime: Any, fp32: Bundle, gpu: Any, plans: dict[Any, Path], host: Callable[[Any, str], None]
) -> None:
    bundle = with_plans(fp32, plans, runtime)
    host(runtime, "sm_90")
    choice = choose(bundle, check=False)  # in another process there is no stand-in
    assert choice.graphs == dict.fromkeys(ORT, runtime)
    graphs = open_choice(bundle, choice)
    try:
        images = gpu_stand_in.images(6)
        scores = graphs.score(images)  # more than the plans' batch: in pieces
        np.testing.assert_array_equal(scores, gpu_stand_in.reference(images)["score"])
        assert scores.shape == (6,)
    finally:
        graphs.close()
    assert graphs == {}


def test_plans_with_code_for_the_cpu_run_only_when_asked_for_by_name(
    fp32: Bundle, plans: dict[Any, Path], host: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "has_cuda", lambda: False)
    bundle = with_plans(fp32, plans, "tensorrt")
    host("tensorrt", "sm_90")
    assert dict.fromkeys(ORT, "tensorrt") in [choice.graphs for choice in candidates(bundle)]
    (plain,) = bundle.manifest.engines
    changed = plain.model_copy(update={"compatible": True, "target": "portable"})
    (bundle.path / "engines" / plain.folder).rename(bundle.path / "engines" / changed.folder)
    bundle = Bundle(bundle.path, bundle.manifest.model_copy(update={"engines": [changed]}))
    assert dict.fromkeys(ORT, "tensorrt") not in [choice.graphs for choice in candidates(bundle)]
    assert usable_plans(bundle, plan_process.probe("tensorrt")) == changed  # what `--backend tensorrt` takes


def test_plans_are_opened_with_what_their_options_ask_for(
    fp32: Bundle, plans: dict[Any, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: dict[str, Any] = {}

    class Sessions:
        graphs: dict[Any, Any] = {}  # noqa: RUF012

        def __init__(self, plans: dict[Any, Path], **options: Any):
            opened.update(options, plans=plans)

    monkeypatch.setattr(backends, "TensorRTSessions", Sessions)
    bundle = with_plans(fp32, plans, "tensorrt")
    (plain,) = bundle.manifest.engines
    open_choice(bundle, Choice(dict.fromkeys(ORT, "tensorrt"), plain))
    assert (opened["weights"], opened["host_code"], opened["max_batch"]) == (None, False, 4)
    assert opened["digest"].split() == [plan.file.sha256 for plan in plain.plans.values()]
    changed = plain.model_copy(update={"stripped": True, "compatible": True, "target": "portable"})
    open_choice(bundle, Choice(dict.fromkeys(ORT, "tensorrt"), changed))
    assert opened["weights"] == {name: bundle.graph_path(name) for name in ORT}
    assert opened["host_code"]
    int8 = with_variants(tmp_path / "int8")
    open_choice(int8, Choice(dict.fromkeys(ORT, "tensorrt"), changed))
    assert opened["weights"]["encoder"] == int8.path / "encoder.gpu.onnx"


def test_plans_for_another_gpu_are_passed_over_by_auto_and_explained_by_name(
    fp32: Bundle, plans: dict[Any, Path], host: Callable[[Any, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_plans(fp32, plans, "tensorrt-rtx")
    host("tensorrt-rtx", "sm_89")
    monkeypatch.setattr(session, "has_cuda", lambda: False)
    monkeypatch.setattr(openvino_session, "is_installed", lambda: False)
    assert choose(bundle, check=False).graphs == ORT
    with pytest.raises(MDNetError, match=r"built for sm_90, this machine has sm_89.*mdnet-export engines") as error:
        open_graphs(bundle, backend="tensorrt-rtx", check=False)
    assert len(str(error.value).splitlines()) == 1


def test_an_altered_plan_is_never_loaded(
    fp32: Bundle, gpu: Any, plans: dict[Any, Path], host: Callable[[Any, str], None]
) -> None:
    bundle = with_plans(fp32, plans, "tensorrt")
    host("tensorrt", "sm_90")
    file = bundle.path / "engines" / bundle.manifest.engines[0].folder / plans["vim"].name
    file.write_bytes(file.read_bytes()[:-1])
    assert "tensorrt" not in choose(bundle, check=False).graphs.values()
    with pytest.raises(MDNetError, match=r"vim.plan has .* bytes"):
        open_graphs(bundle, backend="tensorrt", check=False)


def test_without_openvino_auto_does_without_and_its_name_is_refused(
    fp32: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "has_cuda", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert choose(fp32).graphs == ORT
    assert all(isinstance(graph, OrtSession) for graph in open_graphs(fp32, threads=1).values())
    with pytest.raises(MDNetError, match=r"install mdnet\[openvino\]") as error:
        open_graphs(fp32, backend="openvino", check=False)
    assert len(str(error.value).splitlines()) == 1
