"""A pytest plugin: the native library is its sanitized build, and of each table of cases some are run.

Calls of the C interface run their tasks on four threads of our own (`threads.cpp`), those for the calling thread too.
Under the thread sanitizer, which can't follow ONNX Runtime's threads, an operator's tasks run on the calling thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fences
import numpy as np
import onnxruntime
import pytest

import mdnet_engines
from mdnet_engines.ops import native
from sanitized import SOURCES

FOLDER = Path(os.environ["MDNET_SANITIZED"])
THREADS = 4  # as in threads.cpp
SOME = 6
"""Cases of a test, and of each instruction set where it has one."""
SESSION_OPTIONS = onnxruntime.SessionOptions


class OneThread(SESSION_OPTIONS):  # type: ignore[misc, valid-type]
    """Session options that keep ONNX Runtime from starting threads."""

    def __init__(self) -> None:
        super().__init__()
        SESSION_OPTIONS.intra_op_num_threads.fset(self, 1)

    @property
    def intra_op_num_threads(self) -> int:
        return 1

    @intra_op_num_threads.setter
    def intra_op_num_threads(self, threads: int) -> None:
        pass


def before_a_wall(array: np.ndarray) -> np.ndarray:
    """A float32 copy, and then a page that can't be read: GCC's sanitizers don't see masked vector loads."""
    used = array.size * 4
    size = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory, size))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("mprotect failed")
    inside = np.frombuffer(memory, np.float32, array.size, size - used).reshape(array.shape)
    inside[...] = array
    return inside


def use_the_sanitized_library() -> None:
    mdnet_engines.__path__.insert(0, str(FOLDER))
    loaded = native.library()
    assert loaded is not None
    assert Path(loaded._name).parent == FOLDER
    threads = ctypes.CDLL(str(FOLDER / "threads.so"))
    parallel, parallel_for = (
        ctypes.cast(function, ctypes.c_void_p) for function in (threads.team_parallel, threads.team_parallel_for)
    )

    def on_threads(function: Callable[..., int]) -> Callable[..., int]:
        return lambda call, *_: function(call, parallel_for, None)

    for header in SOURCES.glob("*/*.h"):
        for name in re.findall(r"\bint (mdnet_\w+)\([^()]*, MdnetParallelFor ", header.read_text(encoding="utf-8")):
            setattr(loaded, name, on_threads(getattr(loaded, name)))
    backward, forward = loaded.mdnet_scan_openmp, loaded.mdnet_scan
    loaded.mdnet_scan_openmp = lambda call, gradients, *_: (
        backward(call, gradients, parallel, THREADS) if gradients else forward(call)
    )


def is_worth_its_time(item: Any) -> bool:
    """Whether a test runs our code, on few values: not a property of a hundred calls, or accuracy on a fine grid."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    without = parameters.get("registered") is False or "function_body" in item.name or "elsewhere" in item.fixturenames
    many = getattr(item.obj, "is_hypothesis_test", False) or "as_accurate_as_stated" in item.name
    return not without and not many and item.get_closest_marker("gpu") is None


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    tables: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for item in filter(is_worth_its_time, items):
        function, _, case = item.nodeid.partition("[")
        isa = next((isa for isa in native.ISAS if isa in case.removesuffix("]").split("-")), "")
        tables[function, isa].append(item)
    draw = random.Random(0)
    kept = {item for table in tables.values() for item in draw.sample(table, min(SOME, len(table)))}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


fences.fenced = before_a_wall  # in test modules too, which are imported after this
if os.environ["MDNET_SANITIZER"] == "thread":
    onnxruntime.SessionOptions = OneThread
use_the_sanitized_library()
