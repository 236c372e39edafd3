"""Clients that lie, dawdle, leave or talk nonsense: every request gets one answer, and the server stays up."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import DEADLINE, Answer, Server, post, read_answers, serving

MEBIBYTE = 2**20
READ_TIMEOUT = 1.0


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Server]:
    limits = ("--max-body-mib", 1, "--max-images", 4, "--max-pixels", 10_000, "--read-timeout", READ_TIMEOUT)
    with serving(shared_bundle, *limits) as running:
        yield running
        assert running.process.poll() is None
        assert running.stop() == 0
        assert running.process.stderr is not None
        assert running.process.stderr.read() == ""  # whatever clients did is not the operator's trouble


@pytest.fixture
def image(photo: Callable[..., Path]) -> bytes:
    return photo("a.png").read_bytes()


@pytest.fixture(autouse=True)
def still_serves(server: Server, image: bytes) -> Iterator[None]:
    yield
    assert server.score(image).status == 200
    assert server.metric("mdnet_held_bytes") == 0
    assert server.metric("mdnet_queue_images") == 0


def only(answers: list[Answer]) -> tuple[int, str]:
    """Status and error of the one answer there is."""
    (answer,) = answers
    return answer.status, answer.json.get("error", "")


def score_of(answer: Answer) -> float:
    return answer.json["results"][0]["score"]


# Length.


def test_a_body_shorter_than_it_says_is_told_of_when_the_client_ends(server: Server, image: bytes) -> None:
    status, error = only(server.exchange(post(image, length=len(image) + 1), end=True))
    assert status == 400
    assert "before it was complete" in error


def test_a_body_longer_than_it_says_is_an_image_and_a_bad_request(server: Server, image: bytes) -> None:
    first, second = server.exchange(post(image + b"\0\1garbage", length=len(image)))
    assert (first.status, second.status) == (200, 400)
    assert second.headers["connection"] == "close"


def test_a_body_of_no_stated_length_is_empty(server: Server) -> None:
    request = b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nConnection: close\r\n\r\n"
    status, error = only(server.exchange(request))
    assert status == 400
    assert "empty" in error


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "12, 13", "99999999999999999999999"])
def test_a_length_that_is_none_is_refused(server: Server, image: bytes, length: str) -> None:
    request = b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: " + length.encode() + b"\r\n\r\n" + image
    assert only(server.exchange(request))[0] == 400


def test_two_lengths_or_a_length_of_a_chunked_body_are_refused(server: Server, image: bytes) -> None:
    for extra in ("Content-Length: 3", "Transfer-Encoding: chunked"):
        assert only(server.exchange(post(image, "image/png", extra)))[0] == 400


def chunked(*chunks: bytes, kind: str = "image/png", extension: bytes = b"") -> bytes:
    head = f"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)


def test_a_chunked_body_is_read(server: Server, image: bytes) -> None:
    half = len(image) // 2
    whole = score_of(server.score(image))
    answer = server.exchange(chunked(image[:half], image[half:], b""), end=True)[0]
    assert score_of(answer) == pytest.approx(whole, abs=1e-5)


def test_a_chunk_that_is_none_ends_the_request(server: Server, image: bytes) -> None:
    assert only(server.exchange(chunked(image) + b"zzz\r\n"))[0] == 400


def test_a_body_above_the_limit_is_refused_before_it_is_sent(server: Server) -> None:
    (answer,) = server.exchange(post(b"", length=MEBIBYTE + 1))
    assert answer.status == 413
    assert answer.headers["connection"] == "close"


def test_expect_continue_is_not_answered_with_continue_above_the_limit(server: Server) -> None:
    status, _ = only(server.exchange(post(b"", "image/png", "Expect: 100-continue", length=MEBIBYTE + 1)))
    assert status == 413


def test_a_chunked_body_is_refused_while_it_is_read_and_the_client_can_send_on(server: Server) -> None:
    with server.connect() as client:
        before = server.metric("process_resident_memory_bytes")
        client.sendall(chunked())
        for _ in range(2048):  # 128 MiB
            client.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        assert server.metric("process_resident_memory_bytes") - before < 32 * MEBIBYTE
        client.shutdown(socket.SHUT_WR)
        assert only(read_answers(client))[0] == 413


@pytest.mark.parametrize("flood", ["headers", "one header", "url", "extensions", "trailers", "tiny chunks"])
def test_framing_without_end_is_cut_off(server: Server, flood: str) -> None:
    begin = b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\n"
    start, piece = {
        "headers": (begin, b"x-%d: y\r\n" % 1 * 100),
        "one header": (begin + b"x: ", b"y" * 1000),
        "url": (b"GET /", b"y" * 1000),
        "extensions": (chunked(), b"1;" + b"e" * 1000 + b"\r\nx\r\n"),
        "trailers": (chunked(b"x", b"")[:-2], b"x: y\r\n" * 100),
        "tiny chunks": (chunked(), b"1\r\nx\r\n" * 100),
    }[flood]
    with server.connect() as client:
        client.sendall(start)
        for _ in range(1500):
            client.sendall(piece)
        client.shutdown(socket.SHUT_WR)
        assert only(read_answers(client))[0] in (400, 431)


# Time.


@pytest.mark.parametrize(
    "part", ["GET /healthz HT", "POST /score HTTP/1.1\r\nContent-Length: 9\r\nContent-Type: image/png\r\n\r\n1"]
)
def test_a_request_that_does_not_arrive_is_cut(server: Server, part: str) -> None:
    with server.connect() as client:
        client.sendall(part.encode())
        assert only(read_answers(client))[0] == 408


def test_a_request_that_drips_is_cut(server: Server) -> None:
    with server.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        start = time.monotonic()
        for byte in post(b"", "image/png", "X-Padding: " + 1000 * "x"):
            if time.monotonic() - start > 1.5 * READ_TIMEOUT:
                break
            client.sendall(bytes([byte]))
            time.sleep(0.02)
        assert only(read_answers(client))[0] == 408


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_a_connection_without_a_request_is_closed(server: Server, sent: bytes) -> None:
    assert server.exchange(sent) == []


def test_the_clock_runs_per_request_and_not_while_another_is_worked_on(server: Server, image: bytes) -> None:
    with server.connect() as client:
        for _ in range(3):
            client.sendall(post(image))
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.6 * READ_TIMEOUT)


# Leaving.


@pytest.mark.parametrize("reset", [False, True])
def test_clients_that_leave_in_mid_request_leave_nothing_behind(server: Server, image: bytes, reset: bool) -> None:
    for sent in (b"POST", post(image)[:-20], post(image)):
        client = server.connect()
        client.sendall(sent)
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    deadline = time.monotonic() + DEADLINE
    while server.metric("mdnet_held_bytes") or server.metric("mdnet_queue_images"):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_closes_its_sending_side_gets_its_answer(server: Server, image: bytes) -> None:
    assert only(server.exchange(post(image), end=True))[0] == 200


# Pipelining.


def test_pipelined_requests_get_their_answers_in_order(server: Server, photo: Callable[..., Path]) -> None:
    images = [photo(f"{seed}.png", seed=seed).read_bytes() for seed in range(5)]
    singles = [score_of(server.score(image)) for image in images]
    assert len(set(singles)) == 5
    answers = server.exchange(b"".join(map(post, images)) + b"nonsense\r\n\r\n")
    assert [score_of(answer) for answer in answers[:5]] == pytest.approx(singles, abs=1e-5)
    assert [answer.status for answer in answers] == [200] * 5 + [400]


def test_too_many_pipelined_requests_end_the_connection_after_their_answers(server: Server) -> None:
    answers = server.exchange(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n" * 200)
    statuses = [answer.status for answer in answers]
    assert statuses == [200] * (len(answers) - 1) + [400]
    assert len(answers) < 200


# What is no request, or none of ours.


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /score\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : test\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: test\r\n\r\n",
        b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n",
        b"\0" * 300,
    ],
)
def test_what_is_not_http_gets_400(server: Server, sent: bytes) -> None:
    before = server.metric("mdnet_requests_total", code="400")
    assert only(server.exchange(sent))[0] == 400
    assert server.metric("mdnet_requests_total", code="400") == before + 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/score/", 404),
        ("GET", "/score", 405),
        ("DELETE", "/score", 405),
        ("OPTIONS", "*", 404),
        ("GET", "/v2/models/other", 404),
        ("GET", "/v2/models/mdnet/versions/2", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/mdnet/infer", 405),
        ("POST", "/healthz", 405),
    ],
)
def test_other_paths_and_methods_are_refused_in_json(server: Server, method: str, path: str, status: int) -> None:
    answer = server.request(method, path)
    assert answer.status == status
    assert set(answer.json) == {"error"}


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_a_wish_for_another_protocol_is_ignored(server: Server, image: bytes, protocol: str) -> None:
    wish = ("Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAMAAABk")
    whole = score_of(server.score(image))
    with server.connect() as client:
        request = post(image, "image/png", *wish)
        client.sendall(request[:-99])
        time.sleep(0.1)  # so that the body comes in two pieces
        client.sendall(request[-99:] + post(image, "image/png", "Connection: close"))
        assert [score_of(answer) for answer in read_answers(client)] == pytest.approx([whole, whole], abs=1e-5)


# Bodies.


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "\xe9"])
def test_another_content_type_is_415(server: Server, image: bytes, kind: str) -> None:
    (answer,) = server.exchange(post(image, kind), end=True)
    assert answer.status == 415
    assert "image/*" in answer.json["error"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, gzip"])
def test_a_compressed_body_is_not_unpacked(server: Server, encoding: str) -> None:
    bomb = gzip.compress(bytes(50 * MEBIBYTE))
    answer = server.request("POST", "/score", bomb, content_type="image/png", content_encoding=encoding)
    assert answer.status == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 10_000, 413),
        (b"[" * 50 + b"]" * 50, 400),
        (b'{"images": ' * 60 + b"1" + b"}" * 60, 400),
        (b'{"images": ["\xff\xfe"]}', 400),
        (b'{"images": ["\\ud800"]}', 400),
        (b'{"images": NaN}', 400),
        (b'{"images": [Infinity]}', 400),
        (b'{"images": [1e999]}', 400),
        (b'{"images": [' + b"9" * 100_000 + b"]}", 400),
        (b'{"images": []}', 400),
        (b'{"images": {}}', 400),
        (b'{"images": [null]}', 400),
        (b'{"images": ["aaaa"], "more": 1}', 400),
        (b'{"image": "aaaa"}', 400),
        (b'"images"', 400),
        (b"null", 400),
        (b"", 400),
        (b'{"images": ["', 400),
        (b'{"images": ["aaaa"]} x', 400),
        (b"{" + b'"a": 1,' * 1000 + b'"images": []}', 413),
        (b'{"images": ["a", "a", "a", "a", "a"]}', 413),
    ],
)
def test_json_that_is_not_what_is_expected_is_refused(server: Server, body: bytes, status: int) -> None:
    answer = server.score(body, "application/json")
    assert answer.status == status, answer.body
    assert set(answer.json) == {"error"}


def test_huge_base64_is_refused_by_its_size_and_nonsense_is_its_images_fault(server: Server, image: bytes) -> None:
    huge = json.dumps({"images": [base64.b64encode(bytes(2 * MEBIBYTE)).decode()]}).encode()
    assert server.score(huge, "application/json").status == 413
    mixed = json.dumps({"images": ["!!", base64.b64encode(image).decode(), "", "é"]}).encode()
    answer = server.score(mixed, "application/json")
    assert answer.status == 200
    assert [result["status"] for result in answer.json["results"]] == ["unreadable", "ok", "unreadable", "unreadable"]
    assert answer.json["results"][0]["reason"] == "not base64"


@pytest.mark.parametrize("of_several", [False, True])
def test_a_decompression_bomb_is_refused_by_what_its_header_declares(
    server: Server, image: bytes, png_declaring: Callable[[int, int], bytes], of_several: bool
) -> None:
    for width, height in ((60_000, 60_000), (10_000, 9_000), (101, 100)):
        bomb = png_declaring(width, height)
        if of_several:
            body = json.dumps({"images": [base64.b64encode(each).decode() for each in (bomb, image)]}).encode()
            answer = server.score(body, "application/json")
        else:
            answer = server.score(bomb)
        assert answer.status == (200 if of_several else 422)
        result = answer.json["results"][0]
        assert result["status"] == "unreadable"
        assert result["reason"].startswith(f"{width}x{height} pixels exceed the limit of ")
    assert result["reason"].endswith("10000")  # the server's own limit, below the preprocessing's
