"""Many clients at once, and SIGTERM in the middle of them: every request gets its own answer, none is lost."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from serving import DEADLINE, Server, serving

from mdnet_rt.images.preprocess import load_image

Photo = Callable[..., Path]
CLIENTS = 16
RESETS = (ConnectionResetError, BrokenPipeError)
"""What the system does to a connection that comes at the very moment the port closes, before the server has seen it."""


class Client(threading.Thread):
    """Sends its own image again and again, on one connection or on a new one each time, until told that it is over."""

    def __init__(self, port: int, image: bytes, *, keep: bool):
        super().__init__(daemon=True)
        self._port, self._image, self._keep = port, image, keep
        self.outcomes: Counter[object] = Counter()
        self.scores: set[float] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE)
        with contextlib.closing(connection):
            while not self.stop.is_set():
                try:
                    if connection.sock is None:
                        connection.connect()
                except ConnectionRefusedError:
                    self.outcomes["refused"] += 1
                    return
                try:
                    self._request(connection)
                except (OSError, http.client.HTTPException) as error:
                    self.outcomes["reset" if type(error) in RESETS else repr(error)] += 1
                    return

    def _request(self, connection: http.client.HTTPConnection) -> None:
        connection.request("POST", "/score", self._image, {"Content-Type": "image/png"})
        answer = connection.getresponse()
        document = json.loads(answer.read())
        self.outcomes[answer.status] += 1
        if answer.status == 200:
            self.scores.add(document["results"][0]["score"])
        if not self._keep:
            connection.close()


@pytest.fixture
def images(photo: Photo) -> list[bytes]:
    return [photo(f"{seed}.png", seed=seed).read_bytes() for seed in range(CLIENTS)]


def start(server: Server, images: list[bytes], *, keep: bool) -> list[Client]:
    clients = [Client(server.port, image, keep=keep) for image in images]
    for client in clients:
        client.start()
    return clients


def wait_for_answers(clients: list[Client], number: int) -> None:
    """Wait until each client has so many, or has ended."""
    end = time.monotonic() + DEADLINE
    while any(client.is_alive() and client.outcomes[200] < number for client in clients):
        assert time.monotonic() < end
        time.sleep(0.02)


def outcomes(clients: list[Client]) -> Counter[object]:
    total: Counter[object] = Counter()
    for client in clients:
        client.join(DEADLINE)
        assert not client.is_alive()
        total += client.outcomes
    return total


def test_under_load_every_answer_is_the_score_of_its_own_image(
    shared_bundle: Path, images: list[bytes], expected_score: Callable[[np.ndarray], float]
) -> None:
    with serving(shared_bundle, "--max-batch", 8) as server:
        clients = start(server, images, keep=True)
        wait_for_answers(clients, 20)
        for client in clients:
            client.stop.set()
        total = outcomes(clients)
        assert set(total) == {200}
        for client, image in zip(clients, images, strict=True):
            expected = expected_score(load_image(image, 32))
            # Whatever images it shared its batches with; ONNX Runtime's own sums differ in the last bit by batch size.
            assert sorted(client.scores) == pytest.approx([expected] * len(client.scores), abs=1e-5)
        assert server.metric("mdnet_images_total", status="ok") == total[200]
        assert server.metric("mdnet_batch_size_sum") == total[200]
        assert server.metric("mdnet_batch_size_count") < total[200]  # some images did share one


@pytest.mark.parametrize("keep", [True, False])
def test_sigterm_under_load_loses_no_request(shared_bundle: Path, images: list[bytes], keep: bool) -> None:
    with serving(shared_bundle, "--access-log") as server:
        log: list[str] = []
        assert server.process.stderr is not None
        reader = threading.Thread(target=log.extend, args=(server.process.stderr,), daemon=True)
        reader.start()
        clients = start(server, images, keep=keep)
        wait_for_answers(clients, 10)
        assert server.stop() == 0
        total = outcomes(clients)
        reader.join(DEADLINE)
    # Every request the server has taken got its score, and each client's last try found nobody there.
    assert total[200] == sum(line.endswith('"POST /score HTTP/1.1" 200\n') for line in log) == len(log)
    gone = {"refused"} if keep else {"refused", "reset"}
    assert set(total) - gone == {200}
    assert sum(total[each] for each in gone) == CLIENTS


def test_sigterm_lets_a_request_that_is_being_read_end(shared_bundle: Path, images: list[bytes]) -> None:
    with serving(shared_bundle) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE)
        connection.putrequest("POST", "/score")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(len(images[0])))
        connection.endheaders(images[0][:100])
        server.wait_for_a_body()
        server.process.send_signal(signal.SIGTERM)
        server.wait_until_closed()
        connection.send(images[0][100:])
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("connection")) == (200, "close")
        assert server.process.wait(DEADLINE) == 0


def test_a_request_that_never_ends_is_given_up_when_draining_takes_too_long(shared_bundle: Path) -> None:
    with serving(shared_bundle, "--drain-timeout", 0.5) as server, server.connect() as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n12345678")
        server.wait_for_a_body()
        assert server.stop() == 1
        assert server.process.stderr is not None
        assert server.process.stderr.read() == "stopped; 1 requests have no answer\n"


def test_a_second_signal_ends_it_at_once(shared_bundle: Path) -> None:
    with serving(shared_bundle) as server, server.connect() as client:
        client.sendall(b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n12345678")
        server.wait_for_a_body()
        server.process.send_signal(signal.SIGTERM)
        server.wait_until_closed()
        assert server.stop() == 130


def test_more_connections_than_the_limit_get_503_but_health_is_answered(
    shared_bundle: Path, images: list[bytes]
) -> None:
    with serving(shared_bundle, "--max-connections", 2) as server, server.connect(), server.connect():
        answer = server.score(images[0])
        assert (answer.status, answer.headers["connection"]) == (503, "close")
        assert answer.headers["retry-after"] == "1"
        assert server.request("GET", "/healthz").status == 200


def test_the_load_generator_counts_what_the_server_counts(shared_bundle: Path, photo: Photo) -> None:
    folder = photo("images/a.png").parent
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "serve_load.py"
    with serving(shared_bundle) as server:
        command = [sys.executable, script, server.url, folder, "--clients", 4, "--seconds", 1, "--warmup", 0]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE)
        assert result.returncode == 0, result.stderr
        figures = json.loads(result.stdout)
        assert figures["errors"] == 0
        answered = server.metric("mdnet_requests_total", endpoint="score", code="200")
        assert answered - 4 <= figures["statuses"]["200"] <= answered  # those under way at the end are not measured
        assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p99_ms"] <= figures["max_ms"]


def test_the_bomb_benchmark_measures_an_honest_client_beside_bombs(shared_bundle: Path, photo: Photo) -> None:
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "serve_bombs.py"
    with serving(shared_bundle) as server:
        options = ["--bombs", 2, "--pixels", 250_000, "--seconds", 1]
        command = [sys.executable, script, server.url, photo("a.png"), *options]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=DEADLINE)
        assert result.returncode == 0, result.stderr
        figures = json.loads(result.stdout)
        assert [each["clients"] for each in figures.values()] == [1, 1, 2]
        assert all(set(each["statuses"]) == {"200"} for each in figures.values())


def test_figures_are_percentiles_of_answers_with_a_score() -> None:
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "serve_load.py"
    spec = importlib.util.spec_from_file_location("serve_load", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = [(float(i), i / 1000, 200) for i in range(1, 101)] + [(1.0, 9.0, 429), (1.0, 9.0, 0)]
    figures = module.figures(answers, 10.0, 8)
    assert (figures["p50_ms"], figures["p90_ms"], figures["p99_ms"], figures["max_ms"]) == (51.0, 91.0, 100.0, 100.0)
    assert (figures["images_per_second"], figures["errors"]) == (10.0, 2)
    assert figures["statuses"] == {"lost": 1, "200": 100, "429": 1}
