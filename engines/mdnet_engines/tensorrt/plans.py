"""Plans in a bundle: which there are, whether one can be used here, and how a new set takes its place.

    mdnet-bundle/engines/<runtime>-<version>-<target>/
        encoder.plan  vim.plan  fusion.plan  (timing.cache)  layers.json  engine.json

A set of plans is an `PlanSet` of the manifest, its files are a cache: a bundle opens whatever has become of them. So
whoever wants to load a plan calls `explain_incompatible`, which looks at no file, then `check_plans`, and hands a plan
to native code only after both. `usable_plans` does so for all the sets of a runtime.

A new set is built in a hidden folder next to the old one and replaces it atomically; then the manifest is replaced
atomically. Between the two, the manifest has the old hashes: the plans are refused, the bundle opens.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdnet_engines.bundle.files import Bundle, check_file, read_manifest
from mdnet_engines.bundle.manifest import MANIFEST_NAME, PORTABLE, GraphName, Manifest, PlanRuntime, PlanSet
from mdnet_engines.errors import BundleError, MDNetError
from mdnet_engines.system.atomic import exchange, flush_to_disk, new_file, settle
from mdnet_engines.system.gpu import Gpu
from mdnet_engines.tensorrt.plan_builder import NAMES

ENGINES = "engines"
_SCRATCH = ".building."
OLDEST_PORTABLE = 80  # Turing, sm_75, gets plans of its own only
_OLDEST_FP8 = 89  # Ada; then Hopper and Blackwell
FOR_FP8 = "for GPUs that multiply in FP8: compute capability 8.9 (Ada, sm_89) or newer; a CPU computes it slowly"


@dataclass(frozen=True)
class Host:
    """What this machine can run plans with: the runtime, and the GPU that it would use.

    `problem` says why the runtime can't be used at all. `targets` are the compute capabilities that TensorRT-RTX knows.
    """

    runtime: PlanRuntime
    version: str = ""
    problem: str = ""
    gpu: Gpu | None = None
    targets: tuple[str, ...] = ()


def this_platform() -> str:
    """Operating system and processor, as TensorRT tells plans apart: `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def plans_folder(bundle: Bundle, engines: PlanSet) -> Path:
    return bundle.path / ENGINES / engines.folder


def plan_path(bundle: Bundle, engines: PlanSet, name: GraphName) -> Path:
    """The plan of the graph `name`. To be opened only after `check_plans`."""
    return plans_folder(bundle, engines) / engines.plans[name].file.name


def summary(engines: PlanSet) -> str:
    """How the plans were built, and their size, for one line of output."""
    options = [
        f"batch {engines.batch}",
        f"level {engines.level}" if engines.level is not None else "",
        "without weights" if engines.stripped else "",
        "for later versions too" if engines.compatible else "",
        f"{sum(entry.size for entry in engines.files()) / 1e6:.1f} MB",
    ]
    return ", ".join(filter(None, options))


def rebuild_command(bundle: Bundle, runtime: PlanRuntime) -> str:
    """What a user types to build plans anew."""
    return f"mdnet-export engines {shlex.quote(str(bundle.path))} --backend {runtime}"


def explain_incompatible(engines: PlanSet, manifest: Manifest, host: Host) -> str | None:
    """Why a set of plans can't be used on `host`, or None: what it was built for, and what was found. Reads no file."""
    runtime, gpu = NAMES[engines.runtime], host.gpu
    if other := [name for name, plan in engines.plans.items() if plan.graph != manifest.graphs[name].digest()]:
        return f"built from another {', '.join(other)} than the bundle has now"
    if host.runtime != engines.runtime:
        return f"built for {runtime}, asked for {NAMES[host.runtime]}"
    if host.problem:
        return host.problem
    if engines.compatible and _numbers(host.version) < _numbers(engines.version):
        return f"built by {runtime} {engines.version} for it and later ones, this machine has {host.version}"
    if not engines.compatible and host.version != engines.version:
        return f"built by {runtime} {engines.version}, this machine has {host.version}"
    if engines.platform and engines.platform != this_platform():
        return f"built on {engines.platform}, this machine is {this_platform()}"
    if gpu is not None and (reason := explain_no_fp8(manifest, gpu.sm)):
        return reason
    if gpu is None:
        return f"built for {_target(engines)}, this machine has no NVIDIA GPU (or no driver)"
    if not _runs_on(engines, host, gpu):
        first = f", the first of {gpu.count}: CUDA_VISIBLE_DEVICES chooses another" if gpu.count > 1 else ""
        return f"built for {_target(engines)}, this machine has {gpu.sm} ({gpu.name}){first}"
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")]


def explain_no_fp8(manifest: Manifest, sm: str) -> str | None:
    """Why plans of a bundle can't be for GPUs of compute capability `sm`, where it is fp8 and they have none."""
    if manifest.precision != "fp8" or sm_number(sm) >= _OLDEST_FP8:
        return None
    return (
        f"{sm} has no FP8, which this bundle is in and GPUs have from sm_{_OLDEST_FP8} on; "
        "build one for it with: mdnet-export build --precision int8 (or fp16)"
    )


def _target(engines: PlanSet) -> str:
    if engines.target != PORTABLE:
        return engines.target.replace("-", " and ")
    return f"{'' if engines.compatible else 'RTX '}GPUs from Ampere (sm_80) on"


def _runs_on(engines: PlanSet, host: Host, gpu: Gpu) -> bool:
    if engines.target != PORTABLE:
        return gpu.sm in engines.target.split("-")
    known, number = {sm_number(target) for target in host.targets}, sm_number(gpu.sm)
    if number < OLDEST_PORTABLE or engines.compatible:
        return number >= OLDEST_PORTABLE
    # Of those that TensorRT-RTX knows, and any later; sm_90, between them, is no RTX GPU.
    return number in known or number > max(known, default=0)


def sm_number(sm: str) -> int:
    """`sm_89` → 89."""
    return int(sm.removeprefix("sm_"))


def check_plans(bundle: Bundle, engines: PlanSet) -> None:
    """Raise `BundleError` unless every plan of the set exists in the bundle's own folder, as the manifest says."""
    if damage := _damage(bundle, engines):
        raise BundleError(f"{damage}; build the plans again: {rebuild_command(bundle, engines.runtime)}")


def _damage(bundle: Bundle, engines: PlanSet) -> str | None:
    folder = plans_folder(bundle, engines)
    for step in (folder.parent, folder):
        if step.is_symlink() or not step.is_dir():
            return f"{step} is {'a link' if step.is_symlink() else 'missing'}"
    try:
        for entry in engines.files():
            check_file(folder, entry)
    except (BundleError, FileNotFoundError) as error:  # the latter: it went between two looks
        return str(error) if isinstance(error, BundleError) else f"{error.filename} is missing"
    return None


def usable_plans(bundle: Bundle, host: Host) -> PlanSet:
    """The first set of plans for the host's runtime that can be loaded on it; compatible ones, which are slower, last.

    Raises:
        MDNetError: there is none; says for each what it was built for, what was found, and the command that rebuilds.
    """
    if host.gpu is not None and (reason := explain_no_fp8(bundle.manifest, host.gpu.sm)):
        raise MDNetError(f"{bundle.path}: {reason}")  # no other plans would help
    command, reasons = rebuild_command(bundle, host.runtime), []
    built = [engines for engines in bundle.manifest.engines if engines.runtime == host.runtime]
    for engines in sorted(built, key=lambda engines: engines.compatible):
        reason = explain_incompatible(engines, bundle.manifest, host)
        if reason is None and (reason := _damage(bundle, engines)) is None:
            return engines
        reasons.append(f"{engines.folder} was {reason}" if reason.startswith("built") else reason)
    if not reasons:
        raise MDNetError(f"{bundle.path} has no plans for {NAMES[host.runtime]}; build them with: {command}")
    raise MDNetError(f"{'; '.join(dict.fromkeys(reasons))}; build plans that fit: {command}")


# ---------------------------------------------------------------------------------------------------------- installing


@contextlib.contextmanager
def scratch_folder(bundle: Bundle) -> Iterator[Path]:
    """A hidden folder in `engines/` to build plans in; deleted at the end. Removes those that killed builds left."""
    home = bundle.path / ENGINES
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise BundleError(f"{home} is a link or a file; plans go into a folder of the bundle's own: remove it")
    home.mkdir(exist_ok=True)
    with contextlib.ExitStack() as held:
        with _locked(home):
            _remove_abandoned(home)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=home))
            held.enter_context(_locked(scratch))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            with contextlib.suppress(OSError):  # it has plans, or the bundle was replaced
                home.rmdir()


def install_plans(bundle: Bundle, scratch: Path, engines: PlanSet) -> Bundle:
    """Put a finished folder of plans in its place and enter it in the manifest; gives the bundle as it is then.

    Raises:
        MDNetError: the bundle was replaced by one with other graphs while the plans were built.
    """
    try:
        settle(scratch)
        with _locked(scratch.parent):
            manifest = read_manifest(bundle.path)
            if any(plan.graph != manifest.graphs[name].digest() for name, plan in engines.plans.items()):
                raise FileNotFoundError
            others = [other for other in manifest.engines if other.folder != engines.folder]
            changed = Manifest.model_validate({**manifest.model_dump(), "engines": [*others, engines]})
            file = bundle.path / MANIFEST_NAME
            with new_file(file) as draft:
                draft.write_text(changed.model_dump_json(indent=1) + "\n", encoding="utf-8")
                shutil.copymode(file, draft)
                flush_to_disk(draft)  # before the next step: a full disk must not come between the two
                target = scratch.parent / engines.folder
                if target.exists():
                    exchange(scratch, target)
                else:
                    scratch.rename(target)
    except FileNotFoundError:
        command = rebuild_command(bundle, engines.runtime)
        raise MDNetError(
            f"{bundle.path} was replaced while its plans were built; build them again: {command}"
        ) from None
    return Bundle(bundle.path, changed)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a folder, which ends with the process; `OSError` where another has it and we don't wait.

    Without effect where there are no such locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two builds of one bundle at a time are not kept apart
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if wait:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(home: Path) -> None:
    for folder in home.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError), _locked(folder, wait=False):  # locked: a build that is at work
            shutil.rmtree(folder, ignore_errors=True)
