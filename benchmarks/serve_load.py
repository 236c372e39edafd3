"""Load on a running `mdnet-rt serve`: python benchmarks/serve_load.py http://127.0.0.1:8000 FOLDER --clients 64

Each client keeps one connection and sends its next image when it has the answer to the last. Prints one JSON object:
throughput, latency percentiles over the measured seconds, and how many answers there were of each kind. Bare sockets
in one event loop, since server and clients may have to share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


class Client(asyncio.Protocol):
    """One connection, one request at a time.

    Args:
        requests: whole HTTP requests, to be sent one after the other.
        answers: gets (time of the answer, seconds it took, status) of each; status 0: the connection was lost.
    """

    def __init__(self, requests: Iterator[bytes], answers: list[tuple[float, float, int]]):
        self._requests, self._answers = requests, answers
        self._seen = b""
        self._waiting = False
        self._stopping = False
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def stop(self) -> None:
        """End when the request under way has its answer."""
        self._stopping = True
        if not self._waiting:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, separator, body = self._seen.partition(b"\r\n\r\n")
        if not separator or len(body) < _content_length(head):
            return
        self._seen = b""
        self._note(int(head[9:12]))
        if self._stopping or b"connection: close" in head:
            self._transport.close()
        else:
            self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiting:
            self._note(0)
        if not self.done.done():
            self.done.set_result(None)

    def _send(self) -> None:
        self._waiting, self._start = True, time.perf_counter()
        self._transport.write(next(self._requests))

    def _note(self, status: int) -> None:
        now = time.perf_counter()
        self._waiting = False
        self._answers.append((now, now - self._start, status))


def _content_length(head: bytes) -> int:
    _, _, rest = head.partition(b"content-length: ")
    return int(rest.split(b"\r\n", 1)[0])


def read_requests(host: str, folder: Path) -> list[bytes]:
    """A request to /score for each image in a folder.

    Raises:
        SystemExit: there is none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise SystemExit(f"error: no images in {folder}")
    return [request_for(host, SUFFIXES[file.suffix.lower()], file.read_bytes()) for file in files]


def request_for(host: str, kind: str, body: bytes) -> bytes:
    """A request to /score as bytes."""
    head = f"POST /score HTTP/1.1\r\nhost: {host}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def load(
    url: str, requests: Sequence[bytes], *, clients: int, seconds: float, warmup: float
) -> dict[str, object]:
    """Load the server at `url`; give the figures of `seconds`, which begin after `warmup`."""
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    answers: list[tuple[float, float, int]] = []
    source = itertools.cycle(requests)
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: Client(source, answers), host, port))[1] for _ in range(clients)
    ]
    start = time.perf_counter() + warmup
    await asyncio.sleep(warmup + seconds)
    end = time.perf_counter()
    for client in connections:
        client.stop()
    await asyncio.wait([client.done for client in connections], timeout=60)
    return figures([answer for answer in answers if start <= answer[0] <= end], end - start, clients)


def figures(answers: Sequence[tuple[float, float, int]], seconds: float, clients: int) -> dict[str, object]:
    """Throughput and percentiles of the answers with a score; `errors` counts all others."""
    times = sorted(took for _, took, status in answers if status == 200)
    statuses = Counter(status for _, _, status in answers)

    def percentile(part: float) -> float | None:
        return round(1000 * times[min(len(times) - 1, int(part * len(times)))], 2) if times else None

    return {
        "clients": clients,
        "seconds": round(seconds, 2),
        "images_per_second": round(len(times) / seconds, 2),
        "p50_ms": percentile(0.5),
        "p90_ms": percentile(0.9),
        "p99_ms": percentile(0.99),
        "max_ms": percentile(1.0),
        "statuses": {"lost" if status == 0 else str(status): count for status, count in sorted(statuses.items())},
        "errors": sum(count for status, count in statuses.items() if status != 200),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server, as it says at its start")
    parser.add_argument("images", type=Path, help="folder of images, sent in turn")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60, help="that are measured")
    parser.add_argument("--warmup", type=float, default=2, help="seconds before them")
    arguments = parser.parse_args()
    requests = read_requests(urlsplit(arguments.url).netloc, arguments.images)
    try:
        result = asyncio.run(
            load(
                arguments.url,
                requests,
                clients=arguments.clients,
                seconds=arguments.seconds,
                warmup=arguments.warmup,
            )
        )
    except OSError as error:
        raise SystemExit(f"error: can't connect to {arguments.url}: {error}") from None
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
