"""Build a bundle's plans by a process of its own, and ask it what there is to build with.

    host = probe("tensorrt-rtx")
    built = build_plans(Bundle.open("mdnet-bundle"), host)

Whatever native code does in there, it ends in one line here.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdnet_engines.bundle.files import Bundle, check_file, file_entry
from mdnet_engines.bundle.manifest import PORTABLE, BatchRange, PlanEntry, PlanRuntime, PlanSet
from mdnet_engines.errors import BundleError, MDNetError, UsageError, first_line
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.child_process import ask
from mdnet_engines.system.gpu import Gpu
from mdnet_engines.tensorrt.plan_builder import NAMES, NEEDS_GPU, TIMING_CACHE
from mdnet_engines.tensorrt.plans import (
    OLDEST_PORTABLE,
    Host,
    check_plans,
    explain_no_fp8,
    install_plans,
    plans_folder,
    scratch_folder,
    sm_number,
    this_platform,
)

BATCH = BatchRange(minimum=1, optimum=8, maximum=32)
RECORD = "engine.json"


@dataclass(frozen=True)
class Built:
    """A set of plans and, unless it was there already, what building took: `engine.json`."""

    bundle: Bundle
    engines: PlanSet
    record: dict[str, Any] | None


def probe(runtime: PlanRuntime) -> Host:
    """The version of `runtime` and the GPU here. Never raises: `Host.problem` says why the runtime can't be used."""
    try:
        answer = _ask({"ask": "probe", "runtime": runtime})
    except (MDNetError, OSError) as error:
        return Host(runtime, problem=first_line(error))
    gpu = Gpu(**answer["gpu"]) if answer["gpu"] else None
    return Host(runtime, answer["version"], gpu=gpu, targets=tuple(answer["targets"]))


def default_host() -> Host | None:
    """TensorRT if it is installed and has its GPU, else None: a bundle's build then makes plans by itself."""
    host = probe("tensorrt")
    return None if host.problem or host.gpu is None else host


def build_plans(
    bundle: Bundle,
    host: Host,
    *,
    targets: Sequence[str] = (),
    batch: BatchRange = BATCH,
    workspace_gib: float | None = None,
    level: int | None = None,
    stripped: bool = False,
    compatible: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> Built:
    """Build the plans of all of a bundle's graphs and put them into it. Takes neither torch nor a checkpoint.

    Args:
        host: the runtime to build with, as `probe` found it.
        targets: compute capabilities (`sm_89`), or `current`. By default TensorRT-RTX builds plans that run on any RTX
            GPU from Ampere on; TensorRT builds for the GPU in the machine alone.
        workspace_gib: the most device memory that one layer may use for its intermediate results; no limit by default.
        level: how long TensorRT looks for fast kernels, from 0 to 5; its own default is 3.
        stripped: leave the weights out of the plans: they come from the bundle's graphs when the plans are loaded.
        compatible: build plans that later versions of TensorRT and any GPU from Ampere on run, perhaps more slowly.
        force: rebuild existing plans; otherwise they stay unchanged.
        progress: receives what the builder does, and notes.

    Raises:
        UsageError: targets or options that this runtime does not build for, or a target without FP8 for an fp8 bundle.
        MDNetError: no runtime, no GPU where one is needed, no space, or TensorRT failed; the bundle is as it was.
    """
    if host.problem:
        raise MDNetError(host.problem)
    if host.runtime == "tensorrt" and host.gpu is None:
        raise MDNetError(NEEDS_GPU)
    chosen = _targets(host, targets)
    _check_options(host, level=level, stripped=stripped, compatible=compatible)
    for sm in _capabilities(host, chosen, compatible=compatible):
        if reason := explain_no_fp8(bundle.manifest, sm):
            raise UsageError(reason)
    built_for = host.gpu.sm if host.runtime == "tensorrt" and host.gpu else PORTABLE
    target = PORTABLE if compatible else "-".join(chosen) or built_for
    options: dict[str, Any] = {
        "batch": batch,
        "workspace_gib": workspace_gib,
        "level": level,
        "stripped": stripped,
        "compatible": compatible,
    }
    folder = f"{host.runtime}-{host.version}-{target}"
    old = next((engines for engines in bundle.manifest.engines if engines.folder == folder), None)
    as_before = old is not None and all(getattr(old, name) == value for name, value in options.items())
    if old and as_before and not force and _is_good(bundle, old):
        return Built(bundle, old, None)
    built_from = bundle.on_gpus()
    request = {
        "ask": "build",
        "runtime": host.runtime,
        "graphs": {
            # Not `resolve`: a link's target may have another name, and its file of weights another place.
            # An fp32 bundle is the reference: TF32 would round the factors of its products to ten bits.
            name: {"onnx": str(built_from.graph_path(name).absolute()), "tf32": bundle.manifest.precision != "fp32"}
            for name in bundle.manifest.graphs
        },
        "profiles": batch.profiles(),
        "level": level,
        "stripped": stripped,
        "compatible": compatible,
        "workspace": workspace_gib and int(workspace_gib * 2**30),
        "targets": chosen if host.runtime == "tensorrt-rtx" else [],
        "timing_cache": _old_cache(bundle, old, progress),
    }
    with _no_space(), scratch_folder(bundle) as scratch:
        request["folder"] = str(scratch.resolve())
        answer = _ask(request, progress)
        if host.runtime == "tensorrt":
            try:
                _ask({**request, "ask": "layers"}, progress)
            except MDNetError as error:  # for people to read: no reason to do without plans
                progress.note(f"layers.json has the networks' layers, not the plans' ({error})")
        engines = _describe(bundle, host, target, options, scratch)
        record = engines.model_dump(exclude={"plans", "timing_cache", "gpu"}) | answer
        (scratch / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return Built(install_plans(bundle, scratch, engines), engines, record)


def _describe(bundle: Bundle, host: Host, target: str, options: dict[str, Any], folder: Path) -> PlanSet:
    """The manifest's entry for the plans in `folder`."""
    tuned = host.gpu if host.runtime == "tensorrt" else None
    cache = folder / TIMING_CACHE
    return PlanSet(
        runtime=host.runtime,
        version=host.version,
        target=target,
        platform=this_platform() if tuned else None,
        gpu=tuned.name if tuned else None,
        **options,
        plans={
            name: PlanEntry(file=file_entry(folder / f"{name}.plan"), graph=graph.digest())
            for name, graph in bundle.manifest.graphs.items()
        },
        timing_cache=file_entry(cache) if cache.exists() else None,
    )


def _targets(host: Host, wanted: Sequence[str]) -> list[str]:
    """The compute capabilities to build for, in order and each once; none leaves the choice to the runtime."""
    if "current" in wanted and host.gpu is None:
        raise UsageError(f"there is no NVIDIA GPU here (or no driver): name one of {', '.join(host.targets)}")
    own = host.gpu.sm if host.gpu else ""
    named = [own if target == "current" else target for target in wanted]
    if host.runtime == "tensorrt":
        if other := [target for target in named if target != own]:
            raise UsageError(
                f"TensorRT builds only for the GPU in the machine, {own}, not for {other[0]}; "
                "run this on the machine that will serve, or use --backend tensorrt-rtx"
            )
    elif unknown := [target for target in named if target not in host.targets]:
        known = ", ".join(host.targets)
        raise UsageError(f"{NAMES[host.runtime]} {host.version} has no {unknown[0]}; it builds for {known} or current")
    return sorted(set(named), key=sm_number)


def _capabilities(host: Host, targets: Sequence[str], *, compatible: bool) -> Sequence[str]:
    """The compute capabilities that plans are known to be for: of a range, the oldest."""
    if compatible:
        return [f"sm_{OLDEST_PORTABLE}"]
    return targets or ([host.gpu.sm] if host.runtime == "tensorrt" and host.gpu else [])


def _check_options(host: Host, *, level: int | None, stripped: bool, compatible: bool) -> None:
    """Refuse what this runtime or this GPU does not build."""
    if host.runtime == "tensorrt-rtx":
        if level is not None:
            raise UsageError("TensorRT-RTX builds the same plan at every --level; leave it out")
        if compatible:
            raise UsageError(
                "plans of TensorRT-RTX run on its own version alone, and on any RTX GPU from Ampere on without "
                "--compatible; leave it out, or use --backend tensorrt"
            )
        if stripped and host.gpu is None:  # its compiler runs code on the GPU for weights that it does not keep
            raise MDNetError(
                "TensorRT-RTX builds --stripped plans only where there is a GPU, and there is none (or no driver); "
                "leave --stripped out, or build on the machine that will serve"
            )
    elif compatible and host.gpu and sm_number(host.gpu.sm) < OLDEST_PORTABLE:
        raise UsageError(f"--compatible plans are built on a GPU from Ampere (sm_80) on, and this is {host.gpu.sm}")


def _is_good(bundle: Bundle, engines: PlanSet) -> bool:
    try:
        check_plans(bundle, engines)
    except BundleError:
        return False
    graphs = bundle.manifest.graphs
    return engines.platform in (None, this_platform()) and all(
        plan.graph == graphs[name].digest() for name, plan in engines.plans.items()
    )


def _old_cache(bundle: Bundle, old: PlanSet | None, progress: Progress) -> str | None:
    """The timing cache of the set to be replaced, if it is unchanged since it was written: native code reads it."""
    if old is None or old.timing_cache is None:
        return None
    folder = plans_folder(bundle, old)
    try:
        check_file(folder, old.timing_cache)
    except (BundleError, FileNotFoundError) as error:
        progress.note(f"built without the old timing cache: {error}")
        return None
    return str((folder / old.timing_cache.name).resolve())


def _ask(request: dict[str, Any], progress: Progress = SILENT) -> dict[str, Any]:
    """Put one request to `mdnet_engines.tensorrt.plan_builder`; give its result, or raise what it says went wrong."""
    name = NAMES[request["runtime"]]
    return ask("mdnet_engines.tensorrt.plan_builder", request, name=name, progress=progress)


@contextlib.contextmanager
def _no_space() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MDNetError("no space left on the disk for the plans; free some and try again") from None
        raise
