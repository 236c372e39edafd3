"""Run the server: open the bundle, listen, serve, and drain at the signal to stop.

uvicorn ── Connection ── Counted ── FastAPI ── Service ── Work ── Batcher ── Scorer
 (one event loop, which never waits for decoding or the model)   (threads)
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import numpy as np
import uvicorn
from PIL import Image

from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.manifest import Manifest
from mdnet_engines.console import INTERRUPTED
from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_rt.scoring.scorer import NO_PROBES, Scorer
from mdnet_rt.server.http.app import Counted, Service
from mdnet_rt.server.http.connection import Connection
from mdnet_rt.server.http.routes import make_app
from mdnet_rt.server.metrics import Metrics
from mdnet_rt.server.settings import Settings
from mdnet_rt.server.work import Work

_BACKLOG = 1024  # connections that the system completes before they are accepted


def serve(
    bundle: Path | None,
    *,
    host: str,
    port: int,
    settings: Settings,
    backend: Backend = "auto",
    threads: int = 0,
    check: bool = True,
    face: str | None = None,
    access_log: bool = False,
    tell: Callable[[str], None],
) -> int:
    """Serve a bundle until SIGTERM or SIGINT, then answer what was accepted.

    Args:
        bundle: its folder; without it as `find_bundle` says.
        port: 0 takes one that is free.
        check: refuse to serve where the bundle's probes don't get their scores.
        face: which square of an image is scored, as `Scorer.open` has it.
        tell: called with one line each for the address, the end, and what goes wrong in between.

    Returns:
        An exit code: 0 when everything was answered, 1 when something was not in time, 130 after a second signal.

    Raises:
        UsageError: no bundle, or an address that can't be.
        MDNetError: the address can't be had, or the bundle not be opened.
    """
    _quiet(access_log)
    with (
        contextlib.closing(bind(host, port)) as listener,  # first, as it takes no time to fail
        Scorer.open(
            bundle, backend=backend, threads=threads, batch_size=settings.max_batch, check=check, face=face
        ) as scorer,
    ):
        if check:
            scorer.check()
        scorer.score_batch(np.zeros((1, scorer.image_size, scorer.image_size, 3), np.uint8))  # warms it up
        if (weights := scorer.manifest.provenance.weights) != "checkpoint":
            tell(f"note: this bundle has {weights} weights; its scores mean nothing for real people")
        if scorer.manifest.probes is None:
            tell(NO_PROBES)
        return asyncio.run(run(scorer, listener, settings, tell))


def bind(host: str, port: int) -> socket.socket:
    """A socket with the address; nobody can connect before it listens.

    Raises:
        UsageError: no such host, or a port that needs rights this user lacks.
        MDNetError: the address is in use.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise UsageError(f"can't find the host {printable(host)}; give --host an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not to wait a minute after the last server's end
    try:
        listener.bind(where)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise MDNetError(
                f"port {port} of {host} is in use; give another with --port (0 takes a free one)"
            ) from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} needs rights that this user lacks; use a --port from 1024 on") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"{printable(host)} is not an address of this machine; give --host one") from None
        raise
    return listener


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BatchScorer(Protocol):
    """What is served: a `Scorer`, or what looks like one."""

    manifest: Manifest
    image_size: int

    @property
    def choice(self) -> object:
        """What runs the graphs; its text is shown."""

    def score_batch(self, images: np.ndarray) -> np.ndarray: ...


async def run(scorer: BatchScorer, listener: socket.socket, settings: Settings, tell: Callable[[str], None]) -> int:
    """Serve a scorer on a bound socket until the signal to stop; the exit code is that of `serve`."""
    metrics = Metrics(max_batch=settings.max_batch)
    made = scorer.manifest.preprocessing
    work = Work(scorer.score_batch, scorer.image_size, settings, metrics, to_srgb=made.to_srgb, face=made.face)
    service = Service(scorer.manifest, str(scorer.choice), work, settings, metrics, tell)
    config = uvicorn.Config(
        Counted(make_app(service, metrics), metrics),
        http=cast("Any", functools.partial(Connection, settings=settings, count=metrics.count_nameless)),
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=None,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=cast("int", settings.keep_alive),
        backlog=_BACKLOG,
    )
    server = _Server(config, service, settings, tell, f"{service.stamp.model} on {address(listener)}")
    await server.serve(sockets=[listener])
    work.close(finish=not server.unanswered)
    if server.force_exit:
        return INTERRUPTED
    return 1 if server.unanswered else 0


class _Server(uvicorn.Server):
    """uvicorn's server, which drains as `Connection` does, and ends with an exit code in place of the signal."""

    def __init__(
        self, config: uvicorn.Config, service: Service, settings: Settings, tell: Callable[[str], None], title: str
    ):
        super().__init__(config)
        self._service, self._settings, self._tell, self._title = service, settings, tell, title
        self.unanswered = 0
        """Requests that were given up at the end."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell(f"serving {self._title}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second time
        self.should_exit = self._service.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        at_the_door = [client for each in sockets or [] for client in _accept_all(each)]
        for server in self.servers:
            server.close()
        state, loop = self.server_state, asyncio.get_running_loop()
        protocol = cast("Any", self.config.http_protocol_class)
        connect = functools.partial(protocol, config=self.config, server_state=state, app_state={}, _loop=loop)
        for client in at_the_door:
            await loop.connect_accepted_socket(connect, client)
        end = time.monotonic() + self._settings.drain_timeout
        while (state.connections or state.tasks) and not self.force_exit and time.monotonic() < end:
            for connection in list(state.connections):  # each time: some were accepted, but not yet there
                connection.shutdown()
            await asyncio.sleep(0.05)
        self.unanswered = len(state.tasks)
        for connection in list(state.connections):
            connection.transport.abort()
        if self.unanswered:
            self._tell(f"stopped; {self.unanswered} requests have no answer")


def _accept_all(listener: socket.socket) -> list[socket.socket]:
    """Who has connected and was not accepted yet: closing the listener would reset them."""
    clients: list[socket.socket] = []
    with contextlib.suppress(OSError):  # that there are no more
        while True:
            clients.append(listener.accept()[0])
    return clients


def _quiet(access_log: bool) -> None:
    """Keep what clients provoke off the terminal: it is in answers and metrics."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    for name in ("uvicorn.error", "python_multipart"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    log = logging.getLogger("uvicorn.access")
    log.propagate = False
    if access_log:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
