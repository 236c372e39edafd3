"""Bundle → a model repository of NVIDIA Triton: three models, and an ensemble from preprocessed images to scores.

    OUT/
      README.md            what a client has to know, for people
      mdnet-triton.json    the same for programs; marks a folder that may be replaced
      mdnet/               the ensemble: config.pbtxt, and a version folder with nothing to load in it
      mdnet_encoder/       config.pbtxt, 1/encoder.onnx (+ encoder.onnx.data), or 1/encoder.plan
      mdnet_vim/           likewise (+ libmdnet_ops.so, if requested)
      mdnet_fusion/        likewise

It takes the bundle's manifest and files, and no other package: no torch, no onnx, no protobuf, no Triton.

Files are copied. A hard link would save the space, but `onnx.load` refuses external data that has a second name, so the
bundle's own graphs could not be read any more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mdnet_engines.bundle.files import Bundle, read_manifest
from mdnet_engines.bundle.manifest import GRAPH_NAMES, BatchRange, GraphName, Manifest, PlanSet
from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_engines.ops import native
from mdnet_engines.system.atomic import new_folder
from mdnet_engines.tensorrt.plans import check_plans, plan_path, rebuild_command
from mdnet_export.triton.config import (
    VERSION,
    Kind,
    Serving,
    TritonBackend,
    check_graphs,
    ensemble_config,
    model_config,
    to_text,
)
from mdnet_export.triton.readme import facts, notes_on_serving, readme

MARKER = "mdnet-triton.json"
MAX_BATCH = 16
"""A model's default batch, as for `mdnet-rt score`; plans may take less."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Repository:
    """A model repository that was written: where, how its models are run, and of which plans (TensorRT)."""

    path: Path
    serving: Serving
    plans: PlanSet | None
    size: int
    """Of all files, in bytes."""


def write_repository(
    bundle: Bundle,
    output: Path,
    *,
    name: str = "mdnet",
    backend: TritonBackend = "onnxruntime",
    kind: Kind | None = None,
    instances: int = 1,
    max_batch_size: int | None = None,
    queue_delay: int = 0,
    plans: str | None = None,
    native_scan: str | None = None,
) -> Repository:
    """Write the model repository of `bundle` to `output`, all of it or nothing.

    Args:
        output: free, an empty folder, or a repository that this function wrote, which is replaced atomically.
        name: the ensemble's name, and the beginning of the models' names.
        kind: what runs the models; by default the CPU for ONNX Runtime and the GPU for TensorRT, which has no other.
        max_batch_size: by default `MAX_BATCH`, or what the plans take where that is less.
        queue_delay: how long a request may wait for others to share a batch with, in microseconds.
        plans: which set of plans, by its folder in the bundle; needed only where there are several.
        native_scan: where the server will see the repository (`/models`): the native selective scan is put into it and
            registered by that path. Without it the scan runs its function body.

    Raises:
        UsageError: an argument that can't be right, or `output` is something that must not be replaced.
        MDNetError: there are no plans that Triton can load, the native library is missing, the disk is full, or the
            bundle was replaced meanwhile.
    """
    target = output.resolve()
    _check_name(name)
    check_free(target, bundle)
    check_graphs(bundle.manifest)
    kind = kind or ("cpu" if backend == "onnxruntime" else "gpu")
    if backend == "tensorrt" and (kind == "cpu" or native_scan):
        raise UsageError("plans run on a GPU, with the scan inside; drop --kind cpu and --native-scan")
    if backend != "tensorrt" and plans:
        raise UsageError("--plans requires --backend tensorrt")
    engines = _choose_plans(bundle, plans) if backend == "tensorrt" else None
    batch = engines.batch if engines else None
    serving = Serving(name, backend, kind, instances, _batch_limit(max_batch_size, batch), queue_delay, batch)
    library = _library(native_scan, serving)
    with _replacing(target, bundle) as folder:
        for graph in GRAPH_NAMES:
            files = [plan_path(bundle, engines, graph)] if engines else _onnx_files(bundle, graph, kind)
            path = library[1] if library and _uses_library(bundle, graph, kind) else None
            config = model_config(bundle.manifest, graph, serving, file=files[0].name, op_library=path)
            _write_model(folder / serving.model(graph), config, files)
        if library:
            shutil.copyfile(library[0], folder / serving.model("vim") / library[0].name)
        _write_model(folder / name, ensemble_config(bundle.manifest, serving), [])
        # Git, archives and object stores leave empty folders out, and Triton takes no model without a version.
        (folder / name / str(VERSION) / ".keep").touch()
        _write_facts(folder, bundle.manifest, serving, engines, library[1] if library else None)
        if read_manifest(bundle.path) != bundle.manifest:
            raise MDNetError(f"{bundle.path} was replaced while it was copied; run the command again")
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Repository(target, serving, engines, size)


def check_free(target: Path, bundle: Bundle) -> None:
    """Raise `UsageError` unless `target` is free, empty or a repository of ours, and may be replaced."""
    if target.is_relative_to(bundle.path.resolve()):
        raise UsageError(f"{target} is in the bundle, which is replaced as a whole; choose a folder outside it")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; OUT is the folder to write the model repository to")
    with contextlib.suppress(FileNotFoundError):  # the shell's folder was deleted
        if Path.cwd().is_relative_to(target):
            raise UsageError(f"{target} is the current folder, which can't be replaced; run the command elsewhere")
    found = {path.name for path in target.iterdir()}
    if not found:
        return
    ours = _entries(target / MARKER)
    if not ours:
        raise UsageError(
            f"{target} exists and was not made by mdnet-export triton; it is left alone. Choose another folder"
        )
    if others := sorted(found - ours):
        raise UsageError(
            f"{target} also holds {printable(', '.join(others[:3]))}, which would be lost; move it elsewhere"
        )


def _entries(marker: Path) -> set[str]:
    """What this command put into a repository; nothing where it made none."""
    try:
        document = json.loads(marker.read_bytes()) if marker.is_file() and not marker.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return set()
    entries = document.get("entries") if isinstance(document, dict) else None
    return {entry for entry in entries if isinstance(entry, str)} if isinstance(entries, list) else set()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"--name is {name!r:.80}; expected letters, digits, _ and -, 64 at most, not starting with -")


# ------------------------------------------------------------------------------------------------- what is to be served


def _choose_plans(bundle: Bundle, folder: str | None) -> PlanSet:
    """The set of plans to serve. Triton's TensorRT backend loads those of TensorRT, not those of TensorRT-RTX."""
    graphs, build = bundle.manifest.graphs, f"build them with: {rebuild_command(bundle, 'tensorrt')}"
    built = [each for each in bundle.manifest.engines if each.runtime == "tensorrt" and folder in (None, each.folder)]
    if not built:
        which = "no TensorRT plans" if folder is None else f"no TensorRT plans called {folder!r:.120}"
        raise MDNetError(f"{bundle.path} has {which}; {build}")
    fresh = [each for each in built if all(plan.graph == graphs[name].digest() for name, plan in each.plans.items())]
    if not fresh:
        raise MDNetError(f"{built[0].folder} was built from other graphs than the bundle has now; {build}")
    whole = [each for each in fresh if not each.stripped]
    if not whole:
        raise MDNetError(f"{fresh[0].folder} is without weights, which Triton can't put back; {build}")
    if len(whole) > 1:
        raise UsageError(f"choose one of the sets of plans with --plans: {', '.join(each.folder for each in whole)}")
    check_plans(bundle, whole[0])
    if (smallest := whole[0].batch.minimum) > 1:
        raise MDNetError(f"the plans need at least {smallest} images, but Triton may send one; {build}")
    return whole[0]


def _batch_limit(asked: int | None, plans: BatchRange | None) -> int:
    most = plans.maximum if plans else None
    if most and asked and asked > most:
        raise UsageError(f"--max-batch-size is {asked}; the plans take {most} images at most")
    return asked or min(MAX_BATCH, most or MAX_BATCH)


def _library(root: str | None, serving: Serving) -> tuple[Path, str] | None:
    """The native library here, and its path where the server sees the repository as `root`."""
    if root is None:
        return None
    if not PurePosixPath(root).is_absolute():
        raise UsageError(
            f"--native-scan is {root!r:.120}; expected where the server sees the repository, such as /models"
        )
    if (file := native.custom_op_library()) is None:
        raise MDNetError(native.MISSING)
    return file, str(PurePosixPath(root) / serving.model("vim") / file.name)


def _uses_library(bundle: Bundle, graph: GraphName, kind: Kind) -> bool:
    """Vim has the selective scan; the variant for the CPU of any graph has other operators of ours."""
    return graph == "vim" or (kind == "cpu" and bundle.manifest.graphs[graph].cpu is not None)


# ------------------------------------------------------------------------------------------------------------- on disk


def _onnx_files(bundle: Bundle, graph: GraphName, kind: Kind) -> list[Path]:
    """A graph's file and its weights. Names stay: a graph says itself what its file of weights is called."""
    bundle = bundle.on_gpus() if kind == "gpu" else bundle
    weights = [bundle.path / entry.name for entry in bundle.manifest.graphs[graph].data]
    return [bundle.graph_path(graph, cpu=kind == "cpu"), *weights]


def _write_model(folder: Path, config: dict[str, Any], files: list[Path]) -> None:
    version = folder / str(VERSION)
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(to_text(config), encoding="utf-8")
    for file in files:
        shutil.copyfile(file, version / file.name)


def _write_facts(
    folder: Path, manifest: Manifest, serving: Serving, engines: PlanSet | None, library: str | None
) -> None:
    """README and marker; the marker lists every file, itself included."""
    notes = notes_on_serving(engines, serving.sizes(), library=library)
    models = [serving.model(graph) for graph in GRAPH_NAMES]
    text = readme(manifest, serving.name, models, serving.max_batch_size, notes)
    (folder / "README.md").write_text(text, encoding="utf-8")
    entries = sorted([*(path.name for path in folder.iterdir()), MARKER])
    document = {"made_by": "mdnet-export triton", "entries": entries, **facts(manifest)}
    (folder / MARKER).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(target: Path, bundle: Bundle) -> Iterator[Path]:
    """Give an empty folder next to `target` that replaces it atomically when the block ends without an error."""
    try:
        with new_folder(target, lambda: check_free(target, bundle)) as folder:
            yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # a failed copy names its source
            raise MDNetError(f"no space left on the disk for {target}; nothing was written") from None
        raise
