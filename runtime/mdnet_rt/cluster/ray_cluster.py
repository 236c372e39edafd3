"""The Ray cluster that `ray_engine.py` scores on: how it is reached, and how much of it is taken."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdnet_engines.backends.candidates import Backend
from mdnet_engines.errors import MDNetError, UsageError, first_line
from mdnet_engines.system.cores import available_cores

_CPUS_OF_AN_ACTOR = 4
"""At most: each opens the bundle, so that many small ones would take much memory."""
_GPU_BACKENDS: tuple[Backend, ...] = ("auto", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Pool:
    """How many actors score, and what each takes of its node."""

    actors: int
    cpus: int
    gpus: int = 0

    def __str__(self) -> str:
        each = f"{_count(self.gpus, 'GPU')} and {_count(self.cpus, 'CPU')}" if self.gpus else _count(self.cpus, "CPU")
        return f"{_count(self.actors, 'actor')} of {each}"


def choose_pool(nodes: Sequence[Mapping[str, float]], backend: Backend, actors: int | None = None) -> Pool:
    """One actor for each GPU, where there are any and `backend` may use them; else one for each four CPUs.

    Args:
        nodes: what each node has, by Ray's names: `CPU`, `GPU`.
        actors: as many as the user wants.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes) if backend in _GPU_BACKENDS else 0
    if gpus:
        return Pool(actors or gpus, cpus=1, gpus=1)
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1] or [1]
    each = min(_CPUS_OF_AN_ACTOR, *cpus)
    if actors:
        return Pool(actors, cpus=max(1, min(each, sum(cpus) // actors)))
    return Pool(sum(count // each for count in cpus), cpus=each)


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[str]:
    """Be connected to Ray; gives in words to which."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # half a minute each, where nothing answers
    import ray

    if ray.is_initialized():
        yield "the Ray that is connected"
        return
    named = address or os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise UsageError(f"Ray's address is {named}; give HOST:PORT, on a node of the cluster (Ray Client won't do)")
    ray._private.worker._worker_logs_enabled = False  # of dead actors it tells on standard output, among the rows
    connect = functools.partial(ray.init, address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with without_core_logs():
            try:
                connect(num_cpus=available_cores(), include_dashboard=False)
                where = "a new Ray on this machine"
            except ValueError:  # there is one already, whose size is not ours to say
                connect()
                where = f"the Ray at {ray.get_runtime_context().gcs_address}"
    except Exception as error:
        at = f" at {named}" if named else ""
        raise MDNetError(f"can't connect to Ray{at}: {last_line(error.__cause__ or error)}") from error
    try:
        yield where
    finally:
        ray.shutdown()  # ends a Ray that was started here, and leaves another


@contextlib.contextmanager
def without_core_logs() -> Iterator[None]:
    """Take file descriptor 2 from Ray's C++ half, which warns there of each try and of each actor that Ray Data starts.

    Python's standard error goes on in a copy of it. Not for the whole run: what Ray says when it comes to its end is
    of use.
    """
    try:
        kept, stderr = os.dup(2), sys.stderr
    except OSError:  # closed by the shell
        yield
        return
    try:
        with contextlib.suppress(OSError, AttributeError):  # standard error is something else, in a test perhaps
            if stderr.fileno() == 2:
                sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=stderr.encoding, errors=stderr.errors)
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        sys.stderr = stderr


def last_line(error: BaseException) -> str:
    """The cause is at the end of a traceback that came from afar."""
    return first_line(Exception(next((line for line in reversed(str(error).splitlines()) if line.strip()), "")))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
