"""Hold the stand-in to the real modules: python compare.py MODULE prints, as JSON, what the stand-in has and they lack.

A script of its own, since `tensorrt` may need libraries that only another environment finds (`tensorrt_stubs`).
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # else this folder's tensorrt.py would be the module of that name

from gpu_stand_in import cuda, networks, tensorrt

RTX_ALONE = {"DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy"}
RTX_ALONE |= {"IRuntimeCache", "create_runtime_cache", "set_runtime_cache"}
SAME = {"RtxExecutionContext": "IExecutionContext", "Severity": "ILogger"}  # where the real one has these members


def compare_tensorrt(real: ModuleType) -> list[str]:
    rtx = real.__name__ == "tensorrt_rtx"
    lacks = []
    for name, ours in vars(tensorrt).items():
        if not isinstance(ours, type) or ours.__module__ != tensorrt.__name__ or name == "Specialization":
            continue
        if not rtx and name in (*RTX_ALONE, "RtxExecutionContext"):
            continue
        theirs: Any = getattr(real, SAME.get(name, name), None)
        members = list(ours.__members__) if issubclass(ours, enum.Enum) else [m for m in vars(ours) if m[0] != "_"]
        for member in members:
            if member in ("gpu", "logger") or (member in RTX_ALONE and not rtx):
                continue
            if not hasattr(theirs, member):
                lacks.append(f"{name}.{member}")
            elif inspect.isfunction(function := vars(ours)[member]):
                wanted = list(inspect.signature(function).parameters)
                if wanted not in _overloads(getattr(theirs, member).__doc__, member):
                    lacks.append(f"{name}.{member}({', '.join(wanted)})")
    return lacks + [f"DataType.{kind}" for kind in networks.TYPES if getattr(real.DataType, kind).name != kind]


def compare_cuda(real: ModuleType) -> list[str]:
    lacks = []
    for ours in cuda.ENUMS:
        theirs = getattr(real, ours.__name__)
        lacks += [f"{ours.__name__}.{each.name}" for each in ours if getattr(theirs, each.name, None) != each.value]
    lacks += [name for name, value in cuda.CONSTANTS.items() if getattr(real, name, None) != value]
    for name in cuda.FUNCTIONS:
        wanted = list(inspect.signature(vars(cuda._Functions)[name]).parameters)[1:]
        doc = getattr(real, name).__doc__ or ""
        returned = doc.partition("Returns\n-------\n")[2].partition("\n\n")[0].splitlines()
        results = len([line for line in returned if not line.startswith(" ")]) - 1
        if wanted not in _overloads(doc, name) or results != (name in cuda.WITH_RESULT):
            lacks.append(f"{name}({', '.join(wanted)}) with {results} results")
    return lacks


def _overloads(doc: str | None, name: str) -> list[list[str]]:
    """The parameters' names of each signature that a compiled function's documentation begins with."""
    found = re.findall(rf"{name}\((.*?)\)(?: ->|$)", doc or "", re.MULTILINE)
    return [[re.sub(r":.*", "", each).split()[-1] for each in one.split(",") if each.strip()] for one in found]


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    print(json.dumps(compare_cuda(module) if sys.argv[1].startswith("cuda") else compare_tensorrt(module)))
