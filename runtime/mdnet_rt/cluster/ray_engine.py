"""Scoring on a Ray cluster, by Ray Data: the same rows in the same order as in one process.

    locations ──► shards, in Ray's object store ──► actors, each with the bundle open ──► parts, in order ──► rows

The driver (the process that was started) names the images and writes the rows; actors read the images and score them.
Every node sees bundle and images at the paths that the driver has, or by URL. A shard is a few batches of images, or
one archive, which is not divided. Its rows come back in numbered parts of one batch each, so that none is lost or
repeated unseen where Ray does the shard of an actor that died again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.console import say
from mdnet_engines.errors import MDNetError, first_line, require
from mdnet_rt.cluster.ray_cluster import Pool, choose_pool, connected, last_line, without_core_logs
from mdnet_rt.rows.result import Result
from mdnet_rt.scoring.run import Executor, Settings, local_executor
from mdnet_rt.scoring.scorer import find_bundle

if TYPE_CHECKING:
    import pyarrow as pa

    from mdnet_rt.cluster.ray_shards import Part, Shard

_BATCHES_IN_A_SHARD = 16
_PARTS_AHEAD = 64
_MOST_DEATHS = 10


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
    manifest = Bundle.open(folder).manifest
    with connected(address) as where, ExitStack() as runs:
        import ray

        pool = choose_pool([node["Resources"] for node in ray.nodes() if node["Alive"]], settings.backend, actors)
        say(f"ray: {where}, {pool}")
        threads = settings.threads or (0 if pool.gpus else pool.cpus)
        settings = replace(settings, bundle=folder.absolute(), threads=threads)

        def rows(
            locations: Iterable[str], done: Iterator[str], stop: threading.Event | None = None
        ) -> Iterator[Result]:
            from mdnet_rt.cluster.ray_shards import split

            shards = split(locations, done, settings.batch_size * _BATCHES_IN_A_SHARD)
            worker = {"settings": settings, "digest": manifest.digest(), "folder": os.getcwd()}  # noqa: PTH109
            scored = _score(shards, pool, worker, manifest.preprocessing.image_size, stop or threading.Event())
            return runs.enter_context(closing(scored))  # a run that is left early ends before its Ray does

        yield Executor(manifest, rows)


class _Worker:
    """An actor: opens the bundle once, and scores shard after shard.

    What ends the run goes to the driver as a part of its own. As an exception Ray would wrap it and log it on the way.
    """

    def __init__(self, settings: Settings, digest: str, folder: str, deaths: Any):
        self._batch_size = settings.batch_size
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
            self._error = _explained(error)
            self._error = type(self._error)(f"node {socket.gethostname()}: {self._error}")

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        from mdnet_rt.cluster.ray_shards import decode_shards, encode_part

        for shard in decode_shards(table):
            yield from map(encode_part, self._parts(shard))

    def _parts(self, shard: Shard) -> Iterator[Part]:
        from mdnet_rt.cluster.ray_shards import Part

        number, rows, error = 0, list[Result](), self._error
        if error is None:
            try:
                for row in self._executor.rows(shard.locations, iter(shard.done), None):
                    rows.append(row)
                    if len(rows) == self._batch_size:
                        yield Part(shard.number, number, rows)
                        number, rows = number + 1, []
            except Exception as failure:
                error = _explained(failure)
        yield Part(shard.number, number, rows, last=True, error=error)


def _score(
    shards: Iterable[Shard], pool: Pool, worker: Mapping[str, Any], size: int, stop: threading.Event
) -> Generator[Result, None, None]:
    import ray
    import ray.data

    from mdnet_rt.cluster.ray_shards import decode_parts, encode_shard

    refs: list[Any] = []
    for shard in shards:
        if stop.is_set():
            return
        refs.append(ray.put(encode_shard(shard)))
    if not refs:
        return
    _configure_ray_data()
    deaths = ray.remote(num_cpus=0)(_Deaths).remote()
    parts = ray.data.from_arrow_refs(refs).map_batches(
        _Worker,
        fn_constructor_kwargs={**worker, "deaths": deaths},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(refs))),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus,
    )
    quiet = ExitStack()
    try:
        quiet.enter_context(without_core_logs())
        batches: Any = iter(parts.iter_batches(batch_size=None, batch_format="pyarrow"))
        with closing(batches) as tables:
            received = (part for table in tables for part in decode_parts(table, size))
            for rows in _checked(received, len(refs)):
                quiet.close()
                yield from rows
                if stop.is_set():
                    return
    except ray.exceptions.RayError as error:
        raise MDNetError(f"Ray could not go on: {last_line(error)}") from error
    finally:
        quiet.close()


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


def _configure_ray_data() -> None:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"ray\.")
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # so that each part goes to the driver at once, not with others as a large block
    # Ray Data looks at each actor about ten times a second. By default it lets it have two blocks ready by then, and
    # the actor waits when they are there: 20 parts a second, which is less than a GPU scores.
    context._max_num_blocks_in_streaming_gen_buffer = _PARTS_AHEAD


def _explained(error: Exception) -> MDNetError:
    if isinstance(error, MDNetError):
        return error
    return MDNetError(f"unexpected {type(error).__name__}: {first_line(error)}")
