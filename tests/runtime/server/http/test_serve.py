"""`mdnet-rt serve`: images in, scores out, as OpenAPI says; counted; and one line where it can't start."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from serving import DEADLINE, Answer, Server, serving

from mdnet_rt.cli.main import main
from mdnet_rt.images.preprocess import load_image
from mdnet_rt.server.settings import Settings

Photo = Callable[..., Path]
Expected = Callable[[np.ndarray], float]


@pytest.fixture(scope="module")
def server(shared_bundle: Path) -> Iterator[Server]:
    with serving(shared_bundle, "--max-images", 8) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture
def images(photo: Photo) -> list[bytes]:
    return [photo(f"{seed}.{kind}", seed=seed).read_bytes() for seed, kind in enumerate(("jpg", "png", "webp"))]


@pytest.fixture
def scores(images: list[bytes], expected_score: Expected) -> list[float]:
    return [expected_score(load_image(image, 32)) for image in images]


@pytest.fixture
def black(tmp_path: Path) -> bytes:
    """An image for which the tiny bundle has no finite score."""
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    return (tmp_path / "black.png").read_bytes()


def multipart(*parts: tuple[str, bytes]) -> tuple[bytes, str]:
    """Body and type of a form; each part is its Content-Disposition and its data."""
    pieces = [b"--edge\r\nContent-Disposition: " + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts]
    return b"".join([*pieces, b"--edge--\r\n"]), "multipart/form-data; boundary=edge"


def values(answer: Answer) -> list[float]:
    assert answer.status == 200, answer.body
    return [result["score"] for result in answer.json["results"]]


def test_one_image_several_and_json_have_the_scores_of_the_bundle(
    server: Server, images: list[bytes], scores: list[float]
) -> None:
    for image, score in zip(images, scores, strict=True):
        assert values(server.score(image, "image/jpeg")) == pytest.approx([score], abs=1e-5)
        assert values(server.score(image, "application/octet-stream")) == pytest.approx([score], abs=1e-5)
    body, kind = multipart(*((f'form-data; name="images"; filename="{i}.jpg"', each) for i, each in enumerate(images)))
    answer = server.score(body, kind)
    assert values(answer) == pytest.approx(scores, abs=1e-5)
    assert [result["name"] for result in answer.json["results"]] == ["0.jpg", "1.jpg", "2.jpg"]
    body = json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()
    assert values(server.score(body, "application/json; charset=utf-8")) == pytest.approx(scores, abs=1e-5)


def test_a_body_without_a_type_is_an_image(server: Server, images: list[bytes], scores: list[float]) -> None:
    assert values(server.request("POST", "/score", images[0])) == pytest.approx(scores[:1], abs=1e-5)


def test_names_of_parts_come_back_as_they_are_or_not_at_all(server: Server, images: list[bytes]) -> None:
    heads = [
        "form-data",
        'form-data; name=""',
        'form-data; name="caf\u00e9"',
        'form-data; filename="../\\"<b>.jpg"',
        "nonsense",
    ]
    heads.append(f'form-data; filename="{400 * "x"}"')
    body, kind = multipart(*((head, images[0]) for head in heads))
    answer = server.score(body, kind)
    assert len(set(values(answer))) == 1
    names = [result["name"] for result in answer.json["results"]]
    assert names == [None, None, "caf\u00e9", '../"<b>.jpg', None, 255 * "x"]


def test_a_name_that_is_not_utf8_is_shown_with_the_replacement_character(server: Server, images: list[bytes]) -> None:
    body, kind = multipart(('form-data; filename="caf?.jpg"', images[0]))
    answer = server.score(body.replace(b"caf?", b"caf\xe9"), kind)
    assert answer.json["results"][0]["name"] == "caf\ufffd.jpg"


def test_a_bad_image_among_several_is_its_own_failure(
    server: Server, images: list[bytes], scores: list[float], black: bytes
) -> None:
    bad = [b"not an image", b"", images[1][:100], black]
    parts = [images[0], *bad, images[2]]
    body, kind = multipart(*(("form-data; name=x", part) for part in parts))
    answer = server.score(body, kind)
    results = answer.json["results"]
    assert answer.status == 200
    statuses = [result["status"] for result in results]
    assert statuses == ["ok", "unreadable", "unreadable", "unreadable", "not_finite", "ok"]
    assert [results[0]["score"], results[-1]["score"]] == pytest.approx([scores[0], scores[2]], abs=1e-5)
    assert all(result["score"] is None and result["reason"] for result in results[1:-1])
    assert results[2]["reason"] == "empty file"


def test_the_one_image_of_a_request_without_a_score_is_422_with_the_reason(server: Server, black: bytes) -> None:
    for body, status, reason in ((b"text", "unreadable", "not an image"), (black, "not_finite", "score is not finite")):
        answer = server.score(body)
        assert answer.status == 422
        (result,) = answer.json["results"]
        assert (result["status"], result["score"]) == (status, None)
        assert result["reason"].startswith(reason)
        assert answer.json["error"] == result["reason"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body.replace(b"--edge--", b""), "last boundary"),
        (lambda body: body[:-30], "last boundary"),
        (lambda body: body.replace(b"edge", b"cliff"), "not valid multipart"),
        (lambda body: b"--edge--\r\n", "no image"),
        (lambda body: body.replace(b"form-data", b"form\0data"), ""),
        (lambda body: body.replace(b"Content-Disposition: ", b"Content Disposition "), "not valid multipart"),
        (lambda body: body.replace(b"Content-Disposition", b"x" * 100_000), "not valid multipart"),
        (lambda body: b"preamble", "not valid multipart"),
    ],
)
def test_broken_multipart_is_400(server: Server, change: Callable[[bytes], bytes], reason: str) -> None:
    body, kind = multipart(("form-data; name=x", b"\0" * 100))
    answer = server.score(change(body), kind)
    assert answer.status in ((400,) if reason else (400, 422))
    assert reason in answer.json["error"]


def test_multipart_needs_a_boundary_of_sane_length(server: Server) -> None:
    body, _ = multipart(("form-data; name=x", b"x"))
    for boundary in ("", "; boundary=", "; boundary=" + 5000 * "e"):
        assert server.score(body, "multipart/form-data" + boundary).status == 400


def test_more_images_than_the_limit_are_413(server: Server, images: list[bytes]) -> None:
    body, kind = multipart(*(("form-data", images[0]) for _ in range(9)))
    answer = server.score(body, kind)
    assert answer.status == 413
    assert "more than 8 images" in answer.json["error"]


def test_health_and_readiness(server: Server) -> None:
    for path in ("/healthz", "/readyz"):
        assert server.request("GET", path).status == 200


@pytest.mark.parametrize(
    "path",
    ["/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v2", "/v2/health/live", "/v2/health/ready"]
    + [f"/v2/models/mdnet{version}{part}" for version in ("", "/versions/1") for part in ("", "/ready")],
)
def test_head_is_answered_as_get_without_the_body(server: Server, path: str) -> None:
    get = server.request("GET", path)
    # On one connection: what comes behind an answer without a body is the next answer, not a rest of the first.
    request = f"HEAD {path} HTTP/1.1\r\nHost: test\r\n{{}}\r\n".encode()
    with server.connect() as client:
        client.sendall(request.replace(b"{}", b"") + request.replace(b"{}", b"Connection: close\r\n"))
        received = b""
        while data := client.recv(65536):
            received += data
    heads = received.split(b"\r\n\r\n")
    assert [head.split(b" ")[1] for head in heads[:2]] == [b"200", b"200"]
    assert heads[2:] == [b""]
    assert f"content-type: {get.headers['content-type']}".encode() in heads[0].lower()
    if path != "/metrics":  # whose counts grow from one answer to the next
        assert f"content-length: {len(get.body)}".encode() in heads[0].lower()


def test_head_of_a_path_that_has_no_get_is_405(server: Server) -> None:
    assert server.request("HEAD", "/score").status == 405


@pytest.mark.parametrize("kind", ["data URI", "data URI with parameters", "lines", "lines of Windows"])
def test_base64_comes_as_browsers_and_mail_programs_write_it(
    server: Server, images: list[bytes], scores: list[float], kind: str
) -> None:
    text = base64.b64encode(images[0]).decode()
    lines = [text[at : at + 76] for at in range(0, len(text), 76)]
    written = {
        "data URI": f"data:image/jpeg;base64,{text}",
        "data URI with parameters": f"DATA:image/jpeg;name=a.jpg;BASE64,{text}",
        "lines": base64.encodebytes(images[0]).decode(),
        "lines of Windows": "\r\n".join(lines),
    }[kind]
    answer = server.score(json.dumps({"images": [written]}).encode(), "application/json")
    assert values(answer) == pytest.approx(scores[:1], abs=1e-5)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [written]}
    body = json.dumps({"inputs": [tensor], "outputs": [{"name": "score"}]}).encode()
    answer = server.request("POST", "/v2/models/mdnet/infer", body)
    assert answer.json["outputs"][0]["data"] == pytest.approx(scores[:1], abs=1e-5)


def test_openapi_is_valid_and_lists_what_is_there(server: Server, images: list[bytes]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    document = server.request("GET", "/openapi.json").json
    validator.validate(document)
    model = "/v2/models/{name}"
    versioned = f"{model}/versions/{{version}}"
    assert set(document["paths"]) == {
        "/", "/score", "/healthz", "/readyz", "/metrics", "/v2", "/v2/health/live", "/v2/health/ready",
        *(path + part for path in (model, versioned) for part in ("", "/ready", "/infer")),
    }  # fmt: skip
    post = document["paths"]["/score"]["post"]
    assert set(post["requestBody"]["content"]) == {
        "image/*", "application/octet-stream", "multipart/form-data", "application/json",
    }  # fmt: skip
    assert {"200", "400", "408", "413", "415", "422", "429", "500", "503", "504"} <= set(post["responses"])
    jsonschema = pytest.importorskip("jsonschema")
    for body, status in ((images[0], "200"), (b"text", "422"), (b"", "400")):
        schema = post["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(server.score(body).json, {**schema, "components": document["components"]})


def test_metrics_add_up(shared_bundle: Path, images: list[bytes], black: bytes) -> None:
    with serving(shared_bundle) as server:
        body, kind = multipart(*(("form-data", image) for image in [*images, black, b"text"]))
        assert server.score(body, kind).status == 200
        for image in (images[0], b"text"):
            server.score(image)
        server.score(b"")
        server.request("GET", "/nothing")
        assert server.metric("mdnet_images_total", status="ok") == 4
        assert server.metric("mdnet_images_total", status="not_finite") == 1
        assert server.metric("mdnet_images_total", status="unreadable") == 2
        assert server.metric("mdnet_images_total") == 7
        assert server.metric("mdnet_batch_size_sum") == server.metric("mdnet_queue_seconds_count") == 5
        assert server.metric("mdnet_batch_size_count") == server.metric("mdnet_model_seconds_count")
        assert server.metric("mdnet_decode_seconds_count") == 7
        assert server.metric("mdnet_request_seconds_count") == 2
        codes = {
            code: server.metric("mdnet_requests_total", endpoint="score", code=code) for code in ("200", "422", "400")
        }
        assert codes == {"200": 2, "422": 1, "400": 1}
        assert server.metric("mdnet_requests_total", endpoint="other", code="404") == 1


# What the command line says.


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["serve", *map(str, args)])
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr


def test_a_port_in_use_is_one_line(shared_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = run(shared_bundle, "--port", port)
    assert code == 1
    assert text == f"error: port {port} of 127.0.0.1 is in use; give another with --port (0 takes a free one)\n"


def test_a_port_that_needs_rights_is_one_line(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)  # root, who may run the tests, has the rights
    code, text = run(shared_bundle, "--port", 80)
    assert code == 2
    assert "port 80 needs rights" in text


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1", "", "x" * 300, "\x00"])
def test_a_host_that_is_not_here_is_one_line(shared_bundle: Path, host: str) -> None:
    code, text = run(shared_bundle, "--port", 0, "--host", host)
    assert code == 2
    assert "--host" in text


def test_no_bundle_and_a_bad_one_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MDNET_BUNDLE", raising=False)
    code, text = run("--port", 0)
    assert code == 2
    assert text.startswith("error: no bundle")
    code, text = run(tmp_path, "--port", 0)
    assert code == 1
    assert "is not a bundle" in text
    assert run(tmp_path, "--bundle", tmp_path)[0] == 2


def test_limits_that_contradict_are_one_line(shared_bundle: Path) -> None:
    for options in (("--max-queue", 8), ("--max-held-mib", 8), ("--max-pixels", 10**6 * 90)):
        code, text = run(shared_bundle, "--port", 0, *options)
        assert code == 2
        assert str(options[0]) in text


def test_a_missing_extra_is_one_line(shared_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    code, text = run(shared_bundle, "--port", 0)
    assert code == 1
    assert text == "error: uvicorn is not installed; it comes with the extra mdnet[serve]\n"


def test_the_access_log_has_a_line_for_each_answer_and_is_off_by_default(shared_bundle: Path) -> None:
    for options, lines in ((("--access-log",), 2), ((), 0)):
        with serving(shared_bundle, *options) as server:
            server.request("GET", "/healthz")
            server.request("GET", "/nothing?x=1")
            assert server.stop() == 0
            assert server.process.stderr is not None
            assert len(server.process.stderr.read().splitlines()) == lines


def test_ctrl_c_drains_too(shared_bundle: Path) -> None:
    with serving(shared_bundle) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(DEADLINE) == 0


def test_the_command_line_starts_without_what_only_the_server_needs() -> None:
    code = "import sys, mdnet_rt.cli.main; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"fastapi", "uvicorn", "prometheus_client", "PIL"} & set(modules.stdout.split())


def test_settings_have_the_command_lines_defaults() -> None:
    defaults = {option.name: option.default for option in main.commands["serve"].params}
    settings = Settings()
    assert settings.max_wait == defaults["max_wait_ms"] / 1000
    assert settings.max_body == defaults["max_body_mib"] * 2**20
    assert settings.max_held == defaults["max_held_mib"] * 2**20
    for name in (
        "model_name",
        "max_batch",
        "max_queue",
        "max_images",
        "max_connections",
        "read_timeout",
        "score_timeout",
    ):
        assert getattr(settings, name) == defaults[name]
    assert (settings.keep_alive, settings.drain_timeout) == (defaults["keep_alive"], defaults["drain_timeout"])
