"""The bundles on what serves them on a GPU: ONNX Runtime's CUDA provider, TensorRT 11, TensorRT-RTX.

In the dry run ONNX Runtime's CPU provider takes the place of CUDA's, and TensorRT-RTX, which needs no GPU for it,
builds its plans. Images come from the host and scores return to it in every run that is timed, as in production.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

from gpu.bundles import open_bundle
from gpu.context import CheckFailed, Context, NotInstalled, NotSupported
from gpu.model import Reference, check_scores, reference, singles, speed
from gpu.results import Figure
from mdnet_engines.backends.candidates import Backend, Graphs, named, open_choice
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import BatchRange, PlanRuntime
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native
from mdnet_engines.parity.gates import LIMITS_SCALE
from mdnet_engines.parity.measure import measure
from mdnet_engines.sessions import onnxruntime as session
from mdnet_engines.sessions.placement import end_profiles
from mdnet_engines.sessions.session import run_graphs
from mdnet_engines.tensorrt import plan_process
from mdnet_engines.tensorrt.plans import usable_plans

if TYPE_CHECKING:
    from mdnet_engines.tensorrt.plans import Host

OWN_OP, FUNCTION_BODY = "own op", "function body"


def onnxruntime(context: Context) -> None:
    """fp16 with our operator."""
    name = f"fp16, {OWN_OP}"
    context.expect(f"{name}, nodes", *_names(name, context.sizes.batches))
    opening = functools.partial(_open_ort, context, _backend(context), OWN_OP)
    _rows(context, name, reference(context), context.sizes.batches, opening)


def function_body(context: Context) -> None:
    """fp16 without our operator, as where mdnet was installed without its library: slow, so one image in one row."""
    name = f"fp16, {FUNCTION_BODY}, one image"
    context.expect(name)
    held = reference(context).first()
    with patch.object(native, "custom_op_library", lambda: None):
        context.attempt(name, functools.partial(_one_image, context, held))


def tensorrt_demo(context: Context) -> None:
    """TensorRT 11 on the demo, fp16: plugin, plans and session at a size that takes seconds."""
    _plans(context.small(), "tensorrt", "fp16")


def tensorrt(context: Context, precision: str) -> None:
    """TensorRT 11 at full size."""
    _plans(context, "tensorrt", precision)


def tensorrt_rtx(context: Context) -> None:
    """TensorRT-RTX, fp16."""
    _plans(context, "tensorrt-rtx", "fp16")


def _backend(context: Context) -> Backend:
    return "onnxruntime-cuda" if context.device.is_cuda else "onnxruntime-cpu"


def _one_image(context: Context, held: Reference) -> dict[str, Figure]:
    graphs = _open_ort(context, _backend(context), FUNCTION_BODY)
    known = graphs.score(held.images.pixels).astype(np.float64)  # the first run, which also warms up
    start = time.perf_counter()
    figures = check_scores(graphs.score, held, 1, "fp16", known)
    return {"ms": (time.perf_counter() - start) * 1e3, **figures}


def _open_ort(context: Context, backend: Backend, variant: str) -> Graphs:
    if backend == "onnxruntime-cuda" and (problem := session.cuda_problem()):
        raise NotInstalled(problem)
    if variant == OWN_OP and native.custom_op_library() is None:
        raise NotInstalled("mdnet's native library, which has the operator: it comes with an install")
    bundle = open_bundle(context, "fp16")
    if variant != OWN_OP:
        return open_choice(bundle, named(bundle, backend))
    with TemporaryDirectory() as folder:
        graphs = open_choice(bundle, named(bundle, backend), profile=Path(folder))
        provider = session.PROVIDERS[backend]
        context.attempt(f"fp16, {variant}, nodes", functools.partial(_nodes, context, graphs, provider))
    return graphs


def _nodes(context: Context, graphs: Mapping[str, Any], provider: str) -> dict[str, Figure]:
    """One image, profiled: every scan must run as our operator on `provider`; what runs elsewhere is named."""
    config = context.sizes.config()
    run_graphs(graphs, np.zeros((1, config.image_size, config.image_size, 3), np.uint8))
    placement = end_profiles(graphs.values())
    elsewhere = placement.elsewhere(provider)
    figures: dict[str, Figure] = {
        "selective scans": placement.scans(provider),
        "nodes on another provider": sum(elsewhere.values()),
    }
    if elsewhere:
        figures["of them"] = ", ".join(f"{count} {operator}" for operator, count in elsewhere.items())
    if problem := placement.scan_problem(provider, 2 * config.vim_depth):  # one for each direction
        raise CheckFailed(problem, figures)
    return figures


def _plans(context: Context, runtime: PlanRuntime, precision: str) -> None:
    build, batches = f"{precision}, plans", context.sizes.batches
    context.expect(build, *_names(precision, batches))
    host = plan_process.probe(runtime)
    built = context.attempt(build, functools.partial(_build, context, host, precision))
    if built is not None:
        opening = functools.partial(_open_plans, context, host, precision)
        _rows(context, precision, reference(context), batches, opening)


def _build(context: Context, host: Host, precision: str) -> dict[str, Figure]:
    if host.problem:
        raise NotInstalled(host.problem)
    if host.runtime == "tensorrt" and host.gpu is None:
        raise NotSupported("TensorRT builds only where there is a GPU")
    sizes = context.sizes
    batch = BatchRange(minimum=1, optimum=sizes.goal_batch, maximum=max(sizes.batches))
    built = plan_process.build_plans(open_bundle(context, precision), host, batch=batch)
    if built.record is None:
        return {"note": "were there"}
    graphs = built.record["graphs"].values()
    return {"layers": sum(g["layers"] for g in graphs), "MB": sum(g["bytes"] for g in graphs) / 1e6}


def _open_plans(context: Context, host: Host, precision: str) -> Graphs:
    bundle: Bundle = open_bundle(context, precision)
    try:
        usable_plans(bundle, host)
    except MDNetError as error:  # no GPU, or one that these plans are not for
        raise NotSupported(str(error).partition("; build plans")[0]) from None
    return open_choice(bundle, named(bundle, host.runtime))


def _names(name: str, batches: tuple[int, ...]) -> list[str]:
    """What `_rows` attempts."""
    return [f"{name}, parity", *(f"{name}, batch {n}" for n in batches)]


def _rows(
    context: Context, name: str, held: Reference, batches: tuple[int, ...], opening: Callable[[], Graphs]
) -> None:
    """Open the graphs; a row of the parity gates, then one for each batch. What can't be opened is one row."""
    before = context.device.memory()
    opened: list[Graphs] = []

    def gates() -> dict[str, Figure]:
        opened.append(opening())
        return _gates(context, opened[0], held, name.partition(",")[0])

    parity, *timed = _names(name, batches)
    passed = context.attempt(parity, gates)
    if not opened:
        return
    graphs, precision = opened[0], name.partition(",")[0]
    if passed is not None:
        known = functools.cache(functools.partial(singles, graphs.score, held))
        row = functools.partial(_row, context, graphs, held, precision)
        context.series((each, functools.partial(row, n, before, known)) for each, n in zip(timed, batches, strict=True))
    graphs.close()


def _gates(context: Context, graphs: Graphs, held: Reference, precision: str) -> dict[str, Figure]:
    """The bundle's own gates, graph by graph and on the score, against PyTorch fp32."""
    backend = context.device.kind
    report = measure(graphs, held.outputs, held.images, precision=precision, scale=LIMITS_SCALE, backend=backend)
    figures: dict[str, Figure] = {gate.name: gate.value for gate in report.gates if gate.value is not None}
    if failed := [gate.name for gate in report.gates if gate.failed]:
        raise CheckFailed(f"not within the {precision} limits: {', '.join(failed)}", figures)
    return figures


def _row(
    context: Context,
    graphs: Graphs,
    held: Reference,
    precision: str,
    batch: int,
    before: float,
    known: Callable[[], np.ndarray],
) -> dict[str, Figure]:
    images, _ = held.batch(batch)
    seconds = context.device.measure_blocking(lambda: graphs.score(images), seconds=context.sizes.seconds)
    figures = speed(context, seconds, batch, precision)
    figures["GiB more in use"] = context.device.memory() - before
    try:
        figures |= check_scores(graphs.score, held, batch, precision, known())
    except CheckFailed as error:
        raise CheckFailed(str(error), {**figures, **error.figures}) from None
    return figures
