"""uvicorn's HTTP/1.1 connection with what a server on its own feet needs beside.

- A request that arrives too slowly, in its head or in its body, is ended (408); a silent connection is closed.
- Head, chunk framing and trailers are bounded, and so are pipelined requests; uvicorn keeps whatever is sent.
- An error is answered after the requests before it on the same connection, not in place of their answers.
- Before a connection with unread data is closed, the client gets time to read: a plain close resets it, answer and all.
- A client that closes its sending side still gets its answer, and one that asks for HTTP/2 gets it in HTTP/1.1.
- Draining: connections are told to close by their last answer; idle ones get a moment to send a last request.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from mdnet_rt.server.settings import Settings
from mdnet_rt.server.wire import RefusedError, Wire

MAX_HEAD = 64 * 1024
"""Bytes of a request that are not its body."""
MAX_PIPELINE = 64
_READ = 256 * 1024  # what asyncio reads at once; it may hold the end of the request before
_LINGER = 2.0  # seconds to read an answer after which the connection is closed
_LAST_REQUEST = 1.0  # seconds an idle connection stays open while the server drains


class Connection(HttpToolsProtocol):
    """One client's connection.

    Args:
        settings: limits and time-outs.
        count: called with the status of an answer that no endpoint gave.
    """

    def __init__(self, *args: Any, settings: Settings, count: Callable[[int], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._settings, self._count = settings, count
        self._wires: deque[Wire] = deque()  # of the requests that have no answer yet; the last may still be read
        self._timer: asyncio.TimerHandle | None = None  # of the request that is being read
        self._stuck: asyncio.TimerHandle | None = None  # of answers that the client does not take
        self._chunk = self._received = self._body = 0  # bytes: of this read, of this request, of its body
        self._reading = False  # whether a request has begun that is not complete
        self._headers_done = False
        self._deaf = False  # whether what else the client sends is dropped
        self._failure: RefusedError | None = None  # of a request without a head; answered after the requests before it
        self._draining = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", _Lingering(transport, self.loop)))
        self._start_timer()
        if len(self.connections) > 2 * self._settings.max_connections:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._stuck):
            if timer is not None:
                timer.cancel()
        for wire in self._wires:
            if wire.on_lost is not None:
                wire.on_lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        if self._timer is None:
            self._start_timer()
        self._unset_keepalive_if_required()
        self._chunk = len(data)
        self._received += self._chunk
        self._feed(data)
        if self._reading and self._received - 2 * self._body > MAX_HEAD + _READ:
            self._fail(431, f"more than {MAX_HEAD} bytes of headers or chunk framing")

    def eof_received(self) -> bool:  # type: ignore[override]
        cast("_Lingering", self.transport).peer_done = True
        if self.transport.is_closing():
            return False  # closes it for good
        if self._reading:
            self._fail(400, "the request ended before it was complete")
        elif self._wires:
            self.cycle.keep_alive = False
        return bool(self._wires) or self.transport.is_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(self._settings.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._headers_done = True, False
        self._received, self._body = self._chunk, 0
        if self._timer is None:
            self._start_timer()
        if len(self._wires) > MAX_PIPELINE:
            self._fail(400, f"more than {MAX_PIPELINE} requests at once on one connection")
            raise ValueError  # stops the parser

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # `_feed` will see to it
        before, wire = self.cycle, Wire()
        if len(self.connections) > self._settings.max_connections:
            wire.failure = RefusedError(503, "too many connections", retry_after=1, close=True)
        cast("dict[str, Any]", self.scope)["extensions"] = {"mdnet": wire}
        super().on_headers_complete()
        self._headers_done = True
        self._wires.append(wire)
        if self._draining:  # the last request's answer closes the connection
            self.cycle.keep_alive = False
            if before is not None and not before.response_started:
                before.keep_alive = True

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._reading = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # What uvicorn calls.

    def on_response_complete(self) -> None:
        self._wires.popleft()
        super().on_response_complete()
        self._answer_failure()

    def shutdown(self) -> None:
        if self._draining:
            return
        self._draining = True
        if self._wires:
            self.cycle.keep_alive = False
        else:
            self.loop.call_later(_LAST_REQUEST, self._close_if_idle)

    # Ours.

    def _feed(self, data: bytes) -> None:
        """Parse what has come."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._fail(400, "this is not HTTP/1.1")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Parse a request again without its wish for another protocol, as which the parser has taken its body.

        Java's and curl's clients ask for HTTP/2 in this way, and go on as before when they are not answered.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._fail(400, "this is no proxy")
            return
        lines = [b"%b: %b" % header for header in self.headers if header[0] not in (b"upgrade", b"http2-settings")]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", rest]))

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self._settings.read_timeout, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # by us, since requests before it are being worked on
            self._start_timer()
        elif self._reading:
            self._fail(408, f"the request was not complete after {self._settings.read_timeout:g} s")
        elif not self._wires:
            self.transport.close()  # nothing was sent, or only what is no request

    def _fail(self, status: int, reason: str) -> None:
        """Give up on the request that is being read, and on what may follow it."""
        if self._deaf:
            return
        self._deaf = True
        refused = RefusedError(status, reason, close=True)
        if not (self._reading and self._headers_done):
            self._failure = refused
            self._answer_failure()
        elif self.cycle.response_complete:
            self.transport.close()  # it was answered before it was complete
        else:
            self._wires[-1].failure = refused  # the app waits for more of the body
            self.cycle.keep_alive = False
            self.cycle.message_event.set()

    def _answer_failure(self) -> None:
        if self._failure is None or self._wires or self.transport.is_closing():
            return
        body = json.dumps({"error": self._failure.reason}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self._count(self._failure.status)
        self.transport.write(STATUS_LINE[self._failure.status] + head + body)
        self.transport.close()

    def _close_if_idle(self) -> None:
        if not self._wires and not self._reading:
            self.transport.close()


class _Lingering:
    """A transport whose `close` lets the client read the answer first.

    Closing a socket whose input has not been read resets the connection, and an answer on its way may be lost with it.
    So only the sending side is closed, and the rest when the client has closed its own, or after a moment.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._closing = False
        self.peer_done = False
        """Whether the client has closed its sending side."""
        self.write = transport.write
        self.pause_reading, self.resume_reading = transport.pause_reading, transport.resume_reading
        self.get_extra_info, self.abort = transport.get_extra_info, transport.abort

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def close(self) -> None:
        if self.peer_done or self._transport.is_closing():
            self._transport.close()
        elif not self._closing:
            self._closing = True
            self._transport.write_eof()
            self._transport.resume_reading()  # so that its end is seen
            self._loop.call_later(_LINGER, self._transport.abort)
