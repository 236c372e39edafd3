"""A running `mdnet-rt serve`, and a client that sends bytes as they are."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 60  # seconds after which a test that waits has failed


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; `_` in a header's name stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            return read_answer(connection.getresponse())

    def score(self, body: bytes, kind: str = "image/png") -> Answer:
        return self.request("POST", "/score", body, content_type=kind)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)

    def exchange(self, sent: bytes, *, end: bool = False) -> list[Answer]:
        """Send bytes on one connection, with `end` close its sending side; every answer until the server ends it."""
        with self.connect() as client:
            client.sendall(sent)
            if end:
                client.shutdown(socket.SHUT_WR)
            return read_answers(client)

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, all its labelled samples added up that have these labels."""
        page = self.request("GET", "/metrics").body.decode()
        total = 0.0
        for line in page.splitlines():
            match = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                total += float(match[2])
        return total

    def wait_for_a_body(self) -> None:
        """Wait until the server reads a request's body."""
        end = time.monotonic() + DEADLINE
        while not self.metric("mdnet_held_bytes"):
            assert time.monotonic() < end
            time.sleep(0.01)

    def wait_until_closed(self) -> None:
        """Wait until nobody listens on its port."""
        end = time.monotonic() + DEADLINE
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < end:
                self.connect().close()
                time.sleep(0.01)
            raise AssertionError("the port is still open")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


def read_answer(response: http.client.HTTPResponse) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Answer(response.status, headers, response.read())


def read_answers(client: socket.socket) -> list[Answer]:
    """Every answer that comes until the connection ends."""
    received = b""
    while data := client.recv(65536):
        received += data
    answers = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        length = int(headers["content-length"])
        assert len(rest) >= length, "an answer that is cut off"
        answers.append(Answer(int(lines[0].split()[1]), headers, rest[:length]))
        received = rest[length:]
    return answers


def post(body: bytes, kind: str = "image/png", *extra: str, length: int | None = None) -> bytes:
    """A request to /score as bytes; `length` is what it says of its body."""
    lines = ["POST /score HTTP/1.1", "Host: test", f"Content-Type: {kind}", *extra]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.contextmanager
def serving(bundle: Path, *options: object) -> Iterator[Server]:
    """Start a server on a free port; kill it at the end if it still runs."""
    fixed = ["--port", "0", "--backend", "onnxruntime-cpu"]  # the one that is always there, and the quickest to start
    command = [sys.executable, "-m", "mdnet_rt.cli.main", "serve", str(bundle), *fixed, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        late = threading.Timer(DEADLINE, process.kill)
        late.start()
        try:
            line = process.stderr.readline()
            late.cancel()
            match = re.search(r"^serving .* on http://127\.0\.0\.1:(\d+)$", line.strip())
            assert match, line + process.stderr.read()
            yield Server(process, int(match[1]))
        finally:
            late.cancel()
            if process.poll() is None:
                process.kill()
