"""Environments of processes that are to find this or that TensorRT, and a GPU or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cuda_stub
import tensorrt_stubs

FRONT_END = """
from tensorrt_bindings import *
from tensorrt_bindings import __version__
from tensorrt_stand_in import Builder, OnnxParser, Runtime
"""


def missing() -> str | None:
    """Why there can be no stand-in for TensorRT 11 here, or None."""
    return tensorrt_stubs.missing()


def tensorrt_11(folder: Path, *, gpu: str | None = "90") -> dict[str, str]:
    """Where `import tensorrt` is the stand-in of `tensorrt_stand_in.py`, and the GPU's compute capability is `gpu`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = cuda_stub.environment(folder, tensorrt_stubs.environment(folder))
    (folder / "tensorrt" / "__init__.py").write_text(FRONT_END, encoding="utf-8")
    made["STAND_IN_NOTES"] = str(folder / "notes.jsonl")
    made.pop("STUB_GPU", None)
    return made | ({"STUB_GPU": gpu} if gpu else {})


def with_faults(environment: dict[str, str], engines: Path | None = None, **faults: Any) -> dict[str, str]:
    """`environment`, with what is to go wrong in the stand-in."""
    return {**environment, "STAND_IN_FAULTS": json.dumps(faults), "STAND_IN_SCRATCH": str(engines or "")}


def notes(environment: dict[str, str], call: str) -> list[dict[str, Any]]:
    """What the stand-in noted of one kind of call, in order."""
    lines = Path(environment["STAND_IN_NOTES"]).read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry.pop("call") == call]


def with_modules(folder: Path, **sources: str) -> dict[str, str]:
    """This process's environment, with modules of these sources found before all others."""
    for name, source in sources.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(source, encoding="utf-8")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
