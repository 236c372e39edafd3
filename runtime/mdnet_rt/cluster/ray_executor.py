"""Scoring on a Ray cluster, by Ray Data: the same rows in the same order as in one process.

    locations ──► shards, in Ray's object store ──► actors, each with the bundle open ──► parts, in order ──► rows

The driver (the process that was started) names the images and writes the rows; actors read the images and score them.
Every node sees bundle and images at the paths that the driver has, or by URL. A shard is a few batches of images, or
one archive, which is not divided. Its rows come back in numbered parts, so that none is lost or repeated unseen where
Ray does the shard of an actor that died again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import socket
import sys
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.framed import framed
from mdnet_engines.console import say
from mdnet_engines.errors import MDNetError, UsageError, first_line, require
from mdnet_engines.system.cores import available_cores
from mdnet_rt.cluster.shards import Shard, split
from mdnet_rt.rows.result import Result
from mdnet_rt.scoring.run import Executor, Settings, local_executor
from mdnet_rt.scoring.scorer import find_bundle

if TYPE_CHECKING:
    import pyarrow as pa

_BATCHES_IN_A_SHARD = 16
_ROWS_IN_A_PART = 64
"""At least. Ray Data looks at each actor about ten times a second and lets it have two parts ready by then."""
_MOST_DEATHS = 10
_CPUS_OF_AN_ACTOR = 4
"""At most: each opens the bundle, so that many small ones would take much memory."""
_GPU_BACKENDS: tuple[Backend, ...] = ("auto", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")


@contextlib.contextmanager
def ray_executor(settings: Settings, *, address: str | None = None, actors: int | None = None) -> Iterator[Executor]:
    """Give an executor that scores on a Ray cluster. A cluster that is started for it ends with it.

    Args:
        address: `host:port`, or `local` for a new Ray on this machine; None is Ray's own rule: `$RAY_ADDRESS`, else a
            cluster that `ray start` made here, else a new one. A Ray that is connected already is used as it is.
        actors: processes that score, in place of what `choose_pool` says.

    Raises:
        UsageError: an address that is not for this.
        MDNetError: no Ray installed, or none at that address.
        BundleError: as `Scorer.open`.
    """
    require("ray", "ray")
    require("pyarrow", "ray")
    folder = find_bundle(settings.bundle)
    manifest = framed(Bundle.open(folder).manifest, settings.face)
    with _connected(address) as where, ExitStack() as runs:
        import ray

        pool = choose_pool([node["Resources"] for node in ray.nodes() if node["Alive"]], settings.backend, actors)
        say(f"ray: {where}, {pool}")
        threads = settings.threads or (0 if pool.gpus else pool.cpus)
        settings = replace(settings, bundle=folder.absolute(), threads=threads)

        def rows(
            locations: Iterable[str], done: Iterator[str], stop: threading.Event | None = None
        ) -> Iterator[Result]:
            shards = split(locations, done, settings.batch_size * _BATCHES_IN_A_SHARD)
            worker = {"settings": settings, "digest": manifest.digest(), "folder": os.getcwd()}  # noqa: PTH109
            scored = _score(shards, pool, worker, stop or threading.Event())
            return runs.enter_context(closing(scored))  # a run that is left early ends before its Ray does

        yield Executor(manifest, rows)


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
    actors = actors or sum(count // each for count in cpus)
    return Pool(actors, cpus=max(1, min(each, sum(cpus) // actors)))


class Part(NamedTuple):
    """Some rows of a shard. The last part may have none; it has an `error` where the run must end after them."""

    shard: int
    number: int
    rows: list[Result]
    last: bool = False
    error: MDNetError | None = None


class _Worker:
    """An actor: opens the bundle once, and scores shard after shard.

    What ends the run goes to the driver as a part of its own. As an exception Ray would wrap it and log it on the way.
    """

    def __init__(self, settings: Settings, digest: str, folder: str, deaths: Any):
        self._rows_in_a_part = max(_ROWS_IN_A_PART, settings.batch_size)
        self._stack = ExitStack()
        self._error: MDNetError | None = None
        try:
            _give_up_after_many(deaths)
            with contextlib.suppress(OSError):  # needed for relative paths alone; those are then said not to be there
                os.chdir(folder)
            self._executor = self._stack.enter_context(local_executor(settings))
            if self._executor.manifest.digest() != digest:
                raise MDNetError(f"{settings.bundle} is another bundle there than where the run was started")
        except Exception as error:
            explained = _explained(error)
            self._error = type(explained)(f"node {socket.gethostname()}: {explained}")

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for shard in _unpack(table):
            yield from map(_pack, self._parts(shard))

    def _parts(self, shard: Shard) -> Iterator[Part]:
        number, rows, error = 0, list[Result](), self._error
        if error is None:
            try:
                for row in self._executor.rows(shard.locations, iter(shard.done), None):
                    rows.append(row)
                    if len(rows) == self._rows_in_a_part:
                        yield Part(shard.number, number, rows)
                        number, rows = number + 1, []
            except Exception as failure:
                error = _explained(failure)
        yield Part(shard.number, number, rows, last=True, error=error)


def _score(
    shards: Iterable[Shard], pool: Pool, worker: Mapping[str, Any], stop: threading.Event
) -> Generator[Result, None, None]:
    import ray
    import ray.data

    refs: list[Any] = []
    for shard in shards:
        if stop.is_set():
            return
        refs.append(ray.put(_pack(shard)))
    if not refs:
        return
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # so that each part goes to the driver at once, not with others as a large block
    parts = ray.data.from_arrow_refs(refs).map_batches(
        _Worker,
        fn_constructor_kwargs={**worker, "deaths": ray.remote(num_cpus=0)(_Deaths).remote()},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(refs))),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    batches: Any = iter(parts.iter_batches(batch_size=None, batch_format="pyarrow"))
    try:
        # Ray prints on standard output that an actor has died. A writer of rows has its stream already.
        with ExitStack() as quiet, closing(batches) as tables, contextlib.redirect_stdout(sys.stderr):
            quiet.enter_context(_without_core_logs())
            for rows in _checked((part for table in tables for part in _unpack(table)), len(refs)):
                quiet.close()
                yield from rows
                if stop.is_set():
                    return
    except ray.exceptions.RayError as error:
        raise MDNetError(f"Ray could not go on: {_last_line(error)}") from error


def _checked(parts: Iterable[Part], shards: int) -> Iterator[list[Result]]:
    """The rows of each part, if these are all there, once, and in order."""
    expected = (0, 0)
    for part in parts:
        if (part.shard, part.number) != expected:
            raise part.error or MDNetError(f"Ray gave part {(part.shard, part.number)} of the rows, not {expected}")
        yield part.rows
        if part.error:
            raise part.error
        expected = (part.shard + 1, 0) if part.last else (part.shard, part.number + 1)
    if expected != (shards, 0):
        raise MDNetError(f"Ray gave no part {expected} of the rows")


class _Deaths:
    """An actor that counts how often others have died. Ray starts them again for ever."""

    def __init__(self) -> None:
        self._count = 0

    def add(self) -> int:
        self._count += 1
        return self._count


def _give_up_after_many(deaths: Any) -> None:
    import ray

    if ray.get_runtime_context().was_current_actor_reconstructed and ray.get(deaths.add.remote()) > _MOST_DEATHS:
        raise MDNetError(
            f"scoring processes have died {_MOST_DEATHS} times, for want of memory perhaps: try fewer --ray-actors; "
            "Ray's logs tell more"
        )


def _pack(item: Shard | Part) -> pa.Table:
    """A table of one row, so that Ray has nowhere to cut it."""
    import pyarrow as pa

    return pa.table({"item": [pickle.dumps(item)]})


def _unpack(table: pa.Table) -> Iterator[Any]:
    return map(pickle.loads, table["item"].to_pylist())


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[str]:
    """Be connected to Ray; gives in words to which."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # half a minute each, where nothing answers
    import ray

    if ray.is_initialized():
        yield "the Ray that is connected"
        return
    named = address or os.environ.get("RAY_ADDRESS", "")
    if "://" in named:
        raise UsageError(f"Ray's address is {named}; give HOST:PORT, on a node of the cluster (Ray Client won't do)")
    connect = functools.partial(ray.init, address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with _without_core_logs():
            try:
                connect(num_cpus=available_cores(), include_dashboard=False)
                where = "a new Ray on this machine"
            except ValueError:  # there is one already, whose size is not ours to say
                connect()
                where = f"the Ray at {ray.get_runtime_context().gcs_address}"
    except Exception as error:
        at = f" at {named}" if named else ""
        raise MDNetError(f"can't connect to Ray{at}: {_last_line(error.__cause__ or error)}") from error
    try:
        yield where
    finally:
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it has held back of dead actors
            ray.shutdown()  # ends a Ray that was started here, and leaves another


@contextlib.contextmanager
def _without_core_logs() -> Iterator[None]:
    """Take file descriptor 2 from Ray's C++ half, which warns there of each try and of each actor that Ray Data starts.

    Not for the whole run: what Ray says when it comes to its end is of use.
    """
    try:
        kept = os.dup(2)
    except OSError:  # closed by the shell
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _explained(error: Exception) -> MDNetError:
    if isinstance(error, MDNetError):
        return error
    return MDNetError(f"unexpected {type(error).__name__}: {first_line(error)}")


def _last_line(error: BaseException) -> str:
    """The cause is at the end of a traceback that came from afar."""
    return first_line(Exception(str(error).strip().rpartition("\n")[2]))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
