"""Processes forked from one that has scorers: a fork copies the engines' memory and none of their threads.

To run a graph there may wait for ever, and so may freeing it. Scorers refuse in such a process, and are never freed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from weakref import WeakSet

_SCORERS: WeakSet[object] = WeakSet()


def watch(scorer: object) -> None:
    """Keep a scorer alive in every process that is forked from this one."""
    _SCORERS.add(scorer)
    _watch_forks()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    for scorer in _SCORERS:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(scorer))
    # exit() would go on to ONNX Runtime's own destructors, which wait for threads that it started when it was imported.
    # Handlers run in reverse order: Python has ended, C's files are flushed, then the process is over.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):  # of glibc
        libc.on_exit(libc._exit, None)
        libc.on_exit(libc.fcloseall, None)
