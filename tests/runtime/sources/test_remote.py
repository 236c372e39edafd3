"""Images behind URLs: what a URL means, and what becomes of a server that is slow, wrong or not there."""

from __future__ import annotations

import functools
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mdnet_engines import errors
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.sources import archives, remote
from mdnet_rt.sources.locations import find_locations, read_locations

NAMES = ["img10.jpg", "img2.JPG", "notes.txt", ".hidden.jpg", "album/b.TIFF", "album/deep/c.jpeg", "odd[1].jpg"]
IMAGES = ["album/b.TIFF", "album/deep/c.jpeg", "img2.JPG", "img10.jpg", "odd[1].jpg"]


@pytest.fixture(params=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a folder of images, whose bytes are their names."""
    url = f"file://{tmp_path}/photos" if request.param == "file" else f"memory://{uuid.uuid4()}/photos"
    for name in NAMES:
        put(f"{url}/{name}", name.encode())
    put(f"{url}/../empty/readme.txt".replace("photos/../", ""), b"")
    return url


def put(url: str, content: bytes) -> None:
    system, path = fsspec.core.url_to_fs(url)
    system.makedirs(path.rpartition("/")[0], exist_ok=True)
    system.pipe_file(path, content)


def found(*urls: str) -> list[str]:
    """What is found, below the folder `photos`."""
    return [location.partition("photos/")[2] for location in find_locations(urls)]


def read(*locations: str, column: str | None = None) -> list[bytes | str]:
    """The bytes of each image, or the reason why there are none."""

    def data(entry: Any) -> bytes | str:
        try:
            value = entry.data() if callable(entry.data) else entry.data
        except ImageError as error:
            return str(error)
        return str(value) if isinstance(value, ImageError) else value

    return [data(entry) for entry in read_locations(locations, column=column)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", IMAGES),
        ("/", IMAGES),
        ("/album", IMAGES[:2]),
        ("/*.jpg", ["img10.jpg", "odd[1].jpg"]),
        ("/.*.jpg", [".hidden.jpg"]),
        ("/img[0-9].*", ["img2.JPG"]),
        ("/*", ["album/b.TIFF", "album/deep/c.jpeg", "img2.JPG", "img10.jpg", "notes.txt", "odd[1].jpg"]),
        ("/al*", IMAGES[:2]),
        ("/**/*.jpeg", ["album/deep/c.jpeg"]),
        ("/notes.txt", ["notes.txt"]),
        ("/odd[1].jpg", ["odd[1].jpg"]),  # the literal name comes before the pattern
    ],
)
def test_a_url_expands_as_a_path_does(folder: str, pattern: str, expected: list[str]) -> None:
    assert found(folder + pattern) == expected


def test_what_is_found_is_read(folder: str) -> None:
    assert read(*find_locations([folder])) == [name.encode() for name in IMAGES]


def test_paths_and_urls_can_be_mixed_and_are_kept_once(folder: str, tmp_path: Path) -> None:
    local = tmp_path / "local.png"
    local.touch()
    both = [f"{folder}/img10.jpg", str(local), f"{folder}/img10.jpg"]
    assert list(find_locations(both)) == both[:2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/gone.jpg", "gone.jpg does not exist"),
        ("/*.gif", r"no file matches .*\*\.gif"),
        ("/../empty", "no images in"),
        ("/new\nline.jpg", r"new\\nline\.jpg does not exist"),
    ],
)
def test_a_url_with_nothing_behind_it_is_a_one_line_usage_error(folder: str, pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        find_locations([(folder + pattern).replace("photos/../", "")])
    assert "\n" not in str(caught.value)


def test_an_unknown_scheme_is_one_line() -> None:
    with pytest.raises(MDNetError, match=r"^nope://a/b\.jpg: Protocol not known: nope$"):
        find_locations(["nope://a/b.jpg"])
    reasons = read("nope://a/b.jpg", "nope://a/b.tar")
    assert all("Protocol not known: nope" in str(reason) for reason in reasons)


def test_a_store_that_refuses_is_one_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("credentials\nare wrong")

    system, _ = fsspec.core.url_to_fs(folder)
    monkeypatch.setattr(type(system), "isdir", refuse)
    with pytest.raises(MDNetError, match=r"can't be listed: credentials$"):
        find_locations([folder])


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(MDNetError, match=r"fsspec is not installed; it comes with the extra mdnet\[remote\]"):
        find_locations(["s3://bucket/a.jpg"])


def tar(*members: tuple[str, bytes], mode: str = "w:gz") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def parquet(*cells: bytes | None) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({"left": pa.array(cells), "right": pa.array(cells)}), stream)
    return stream.getvalue()


MEMBERS = [(f"{i}.jpg", os.urandom(40_000)) for i in range(3)]


def test_archives_are_read_where_they_are(folder: str) -> None:
    put(f"{folder}/a.tar.gz", tar(*MEMBERS))
    put(f"{folder}/a.parquet", parquet(b"1", None))
    assert found(f"{folder}/*.tar.gz") == ["a.tar.gz"]
    entries = list(read_locations([f"{folder}/a.tar.gz"]))
    assert [(entry.name, entry.data) for entry in entries] == [(f"{folder}/a.tar.gz::{n}", data) for n, data in MEMBERS]
    assert read(f"{folder}/a.parquet", column="right") == [b"1", "no image in this row"]
    (reason,) = read(f"{folder}/a.parquet")
    assert str(reason).startswith("the columns left, right may all hold images")


def test_what_is_gone_when_it_is_read_is_a_row(folder: str) -> None:
    gone = [f"{folder}/gone{suffix}" for suffix in (".jpg", ".tar", ".parquet")]
    assert read(*gone, f"{folder}/img2.JPG") == ["no such file"] * 3 + [b"img2.JPG"]


def test_a_folder_in_a_list_is_a_row(folder: str) -> None:
    (reason,) = read(f"{folder}/album")
    assert isinstance(reason, str)


def test_a_file_over_the_limit_is_a_row(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (archives, remote):
        monkeypatch.setattr(module, "MAX_BYTES", 4)
    put(f"{folder}/fits.jpg", b"four")
    put(f"{folder}/large.jpg", b"large")
    assert read(f"{folder}/fits.jpg", f"{folder}/large.jpg") == [b"four", "5 bytes exceed the limit of 4"]


FILES = {"ok.jpg": os.urandom(100_000), "a.tgz": tar(*MEMBERS), "a.parquet": parquet(b"1", b"2"), "none.jpg": b""}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `FILES`; folders before a file's name say how badly."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        *how, name = self.path.partition("?")[0].strip("/").split("/")
        status = int(how[0]) if how and how[0].isdigit() else 200 if name in FILES else 404
        body = FILES.get(name, b"") if status == 200 else b""
        if "slow" in how:
            time.sleep(0.2)
        self.send_response(status)
        if "unsized" in how:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.close_connection = bool({"cut", "unsized"} & set(how))
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if "cut" in how else body)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec's http needs it")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=functools.partial(running.serve_forever, 0.01)).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_http_is_read_as_it_is_named(server: str) -> None:
    urls = [f"{server}/{name}" for name in ("ok.jpg", "ok.jpg?size=3", "slow/ok.jpg", "unsized/ok.jpg", "none.jpg")]
    assert list(find_locations(urls)) == urls
    assert read(*urls) == [FILES["ok.jpg"]] * 4 + [b""]


SIGNED = "?Credential=AK%2F2026%2Feast&Signature=ab%2Bcd%3D&name=%22x%20y.jpg%22&odd=a+b%7E~"


class Store(Handler):
    """An object store: answers only GET of the very bytes that were signed, of one of them with a redirection."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        name = self.path.removesuffix(SIGNED).removeprefix("/b/my%20face%2B1/")
        if name == "moved.jpg":
            self.send_response(302)
            self.send_header("Location", f"/b/my%20face%2B1/ok.jpg{SIGNED}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == f"/b/my%20face%2B1/{name}{SIGNED}" and name in FILES:
            self.path = name
            self._answer()
        else:
            self.send_error(403)


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="fsspec's http needs it")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store) as running:
        threading.Thread(target=functools.partial(running.serve_forever, 0.01)).start()
        yield f"http://127.0.0.1:{running.server_port}/b"
        running.shutdown()


def test_a_signed_url_goes_out_byte_for_byte(store: str) -> None:
    folder = f"{store}/my%20face%2B1"
    assert read(f"{folder}/ok.jpg{SIGNED}") == [FILES["ok.jpg"]]
    assert read(f"{folder}/moved.jpg{SIGNED}") == [FILES["ok.jpg"]]  # where the signature is in the redirection
    assert read(f"{folder}/a.tgz{SIGNED}") == [data for _, data in MEMBERS]
    assert read(f"{folder}/a.parquet{SIGNED}", column="left") == [b"1", b"2"]


def test_what_no_request_may_hold_is_encoded(server: str) -> None:
    assert read(f"{server}/slow/é à/ok.jpg?a=b c") == [FILES["ok.jpg"]]


@pytest.mark.parametrize("name", ["a.tgz", "a.tgz?token=a.jpg", "unsized/a.tgz", "slow/a.tgz"])
def test_an_archive_over_http_is_read(server: str, name: str) -> None:
    entries = list(read_locations([f"{server}/{name}"]))
    assert [(entry.name, entry.data) for entry in entries] == [(f"{server}/{name}::{n}", data) for n, data in MEMBERS]


def test_a_urls_path_says_what_it_is_and_not_its_query(server: str) -> None:
    assert read(f"{server}/a.parquet?signature", column="left") == [b"1", b"2"]
    assert read(f"{server}/ok.jpg?then=a.tar") == [FILES["ok.jpg"]]


def test_parquet_over_http_is_read(server: str) -> None:
    assert read(f"{server}/a.parquet", column="left") == [b"1", b"2"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.jpg", "no such file"),
        ("gone.tgz", "no such file"),
        ("gone.parquet", "no such file"),
        ("403/ok.jpg", "can't be fetched (403, message='Forbidden'"),
        ("500/ok.jpg", "can't be fetched (500, message='Internal Server Error'"),
        ("500/a.tgz", "can't be fetched (500, message='Internal Server Error'"),
        ("500/a.parquet", "can't be fetched (500, message='Internal Server Error'"),
        ("cut/ok.jpg", "can't be fetched (Response payload is not completed"),
        ("cut/a.tgz", "Response payload is not completed"),
        ("cut/a.parquet", "Response payload is not completed"),
        ("unsized/cut/a.tgz", "Compressed file ended before"),
    ],
)
def test_a_server_that_fails_is_a_row(server: str, name: str, reason: str) -> None:
    *before, last = read(f"{server}/{name}")
    assert str(last).startswith(reason)
    assert before == [data for _, data in MEMBERS][: len(before)]


def test_a_server_that_is_not_there_is_a_row() -> None:
    for reason in read("http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9/a.tar", "http://no-such-host.invalid/a.jpg"):
        assert str(reason).startswith("can't be fetched (Cannot connect to host")


def test_nothing_is_logged_to_the_terminal(server: str) -> None:
    urls = [f"{server}/{name}" for name in ("unsized/a.tgz", "cut/a.tgz", "500/ok.jpg", "gone.jpg")]
    program = f"""
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.sources.locations import read_locations
for entry in read_locations({urls!r}):
    try:
        callable(entry.data) and entry.data()
    except ImageError:
        pass
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stderr == b""
