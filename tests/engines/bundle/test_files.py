"""Opening a bundle that somebody tampered with, and writing one while things go wrong."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdnet_engines.bundle import files as bundle_module
from mdnet_engines.bundle.files import Bundle, file_entry, sha256_of, write_bundle
from mdnet_engines.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from mdnet_engines.errors import BundleError, UsageError

GRAPHS = ("encoder", "vim", "fusion")
FILES = sorted([MANIFEST_NAME, "encoder.onnx.data", "parity.json", "probes.npz", *(f"{name}.onnx" for name in GRAPHS)])


# ---------------------------------------------------------------------------------------------------- a small bundle


def describe(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"name": file.name, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def fill(folder: Path, preset: str = "demo") -> Path:
    """Write a valid bundle's files to a folder. Nothing here runs the graphs: their bytes only name `preset`."""
    for name in FILES:
        (folder / name).write_bytes(f"{name} of {preset}".encode())
    image = {"name": "image", "dtype": "uint8", "shape": ["batch", 64, 64, 3]}
    tokens = {"name": "tokens", "dtype": "float32", "shape": ["batch", 17, 24]}
    document = {
        "schema_version": 2,
        "preset": preset,
        "precision": "fp32",
        "preprocessing": {"image_size": 64},
        "score": {"minimum": 1, "maximum": 5},
        "graphs": {
            name: {
                "file": describe(folder / f"{name}.onnx"),
                "data": [describe(folder / "encoder.onnx.data")] if name == "encoder" else [],
                "precision": "fp32",
                "inputs": [tokens if name == "fusion" else image],
                "outputs": [tokens],
            }
            for name in GRAPHS
        },
        "probes": describe(folder / "probes.npz"),
        "reports": [describe(folder / "parity.json")],
        "parity": {"passed": True, "images": 2, "source": "drawn faces", "max_abs": 0.0, "mean_abs": 0.0},
        "provenance": {"weights": "random", "command": "mdnet-export build", "versions": {"torch": "2.9"}},
        "licenses": ["Apache-2.0"],
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    return folder


def build(destination: Path | str, preset: str = "demo") -> None:
    with write_bundle(destination) as scratch:
        fill(scratch, preset)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mdnet-bundle").mkdir()
    return fill(tmp_path / "mdnet-bundle")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    change(document)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


def refusal(folder: Path | str) -> str:
    """The one line with which `Bundle.open` refuses; fails instead of waiting when it blocks."""
    caught: list[BaseException] = []

    def target() -> None:
        try:
            Bundle.open(folder)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive(), "Bundle.open hangs"
    assert caught, "Bundle.open accepted it"
    assert type(caught[0]) is BundleError, repr(caught[0])
    (line,) = str(caught[0]).splitlines()
    return line


# ------------------------------------------------------------------------------------------------------------ reading


def test_a_good_bundle_opens(folder: Path) -> None:
    for path in (folder, str(folder)):
        bundle = Bundle.open(path)
        assert bundle.path == folder
        assert bundle.manifest.preset == "demo"
        assert [bundle.graph_path(name) for name in GRAPHS] == [folder / f"{name}.onnx" for name in GRAPHS]


def test_a_good_bundle_opens_through_a_link_to_its_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").manifest.preset == "demo"


def test_digests_are_those_of_sha256(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * 10_000)  # more than one chunk
    assert sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_entry(file).model_dump() == describe(file)


@pytest.mark.parametrize("where", ["nowhere", "empty", "file.txt"])
def test_a_path_that_is_no_bundle_says_how_to_make_one(where: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    line = refusal(tmp_path / where)
    assert where in line
    assert "mdnet-export build" in line


def test_a_manifest_that_would_fill_memory_is_refused(folder: Path) -> None:
    manifest = folder / MANIFEST_NAME
    valid = manifest.read_bytes()
    manifest.write_bytes(valid + b" " * (MAX_MANIFEST_BYTES - len(valid)))
    Bundle.open(folder)  # exactly at the limit
    with manifest.open("r+b") as stream:
        stream.truncate(2**40)  # sparse: a terabyte to read, nothing on disk
    assert f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES}" in refusal(folder)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"not json",
        b'{"schema_version": 1',
        b"\xff\xfe\x00\x01",
        b'"\xe9"',
        b"\0" * 64,
        b"1" * 100_000,
        b"[" * 500_000,
        b'{"a":' * 150_000,
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_bytes_that_are_not_json_are_refused(raw: bytes, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_bytes(raw)
    assert f"{MANIFEST_NAME} is not JSON" in refusal(folder)


@pytest.mark.parametrize("depth", [50, 150, 300, 600, 900, 950, 980, 990, 1000, 20_000])
@pytest.mark.parametrize("field", ["schema_version", "preset", "unknown"])
def test_deep_nesting_never_overflows_the_stack(field: str, depth: int, folder: Path) -> None:
    """Near the interpreter's limit JSON still parses, and what prints or validates the value could overflow."""
    document = json.loads((folder / MANIFEST_NAME).read_text()) | {field: "DEEP"}
    (folder / MANIFEST_NAME).write_text(json.dumps(document).replace('"DEEP"', "[" * depth + "]" * depth))
    assert MANIFEST_NAME in refusal(folder)


@pytest.mark.parametrize("document", [None, [], 1, "manifest", [1, 2]], ids=repr)
def test_json_that_is_no_object_is_refused(document: object, folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    assert MANIFEST_NAME in refusal(folder)


@pytest.mark.parametrize("version", [4, 0, -1, 999, "1", None, 1.5, True, [1], {"1": 1}], ids=repr)
def test_another_schema_version_is_named_as_such(version: object, folder: Path) -> None:
    """Before anything else: what a newer manifest says in its other fields is not judged by this one's rules."""
    rewrite(folder, lambda document: document.update(schema_version=version, newer_field=1))
    line = refusal(folder)
    assert f"schema version {version!r}" in line
    assert "reads 1, 2, 3" in line


def test_a_missing_schema_version_is_refused(folder: Path) -> None:
    rewrite(folder, lambda document: document.pop("schema_version"))
    assert "schema version" in refusal(folder)


@pytest.mark.parametrize("place", [(), ("graphs", "vim"), ("graphs", "vim", "file"), ("parity",)], ids=".".join)
def test_an_unknown_field_is_named(place: tuple[str, ...], folder: Path) -> None:
    def add(document: dict[str, Any]) -> None:
        functools.reduce(lambda node, key: node[key], place, document)["mispelt"] = 1

    rewrite(folder, add)
    assert ".".join((*place, "mispelt")) in refusal(folder)


HOSTILE = {
    "line": "x\nerror: all is well",
    "return": "x\rerror: all is well",
    "escape": "\x1b[2Jx",
    "separator": "x\u2028y",
    "long": "x" * 900_000,
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_field_name_leaves_the_message_one_short_printable_line(name: str, folder: Path) -> None:
    """A field's name goes to the terminal: it must not forge a second line, move the cursor or fill the screen."""
    rewrite(folder, lambda document: document.update({name: 1}))
    line = refusal(folder)
    assert line.isprintable()
    assert len(line) < 1000


def test_a_long_schema_version_leaves_the_message_short(folder: Path) -> None:
    rewrite(folder, lambda document: document.update(schema_version="9" * 900_000))
    assert len(refusal(folder)) < 1000


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("place", ["score.maximum", "parity.max_abs"])
def test_numbers_that_are_not_finite_are_refused(place: str, number: str, folder: Path) -> None:
    """They are not JSON, and every comparison with NaN is false: gates and ranges would hold nothing."""
    part, field = place.split(".")
    rewrite(folder, lambda document: document[part].update({field: "NUMBER"}))
    manifest = folder / MANIFEST_NAME
    manifest.write_text(manifest.read_text().replace('"NUMBER"', number))
    assert MANIFEST_NAME in refusal(folder)


OUTSIDE = [
    "../secret",
    "..",
    ".",
    "",
    "sub/vim.onnx",
    "./vim.onnx",
    "..\\secret",
    "C:vim.onnx",
    "vim.onnx\0",
    "\0",
    "vim.onnx\n",
    "vim onnx",
    "vím.onnx",
    "vim\u2215onnx",
    "\uff0e\uff0e",
    ".hidden",
    "-rf",
    "~",
    "a" * 129,
    "ABSOLUTE",
]


@pytest.mark.parametrize("kind", ["file", "data", "reports"])
@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name[:20]))
def test_a_name_that_could_leave_the_folder_is_refused(name: str, kind: str, folder: Path) -> None:
    """Refused for the name itself: the file that it points to is there, with the right size and hash."""
    secret = folder.parent / "secret"
    secret.write_bytes(b"secret")
    entry = describe(secret) | {"name": str(secret) if name == "ABSOLUTE" else name}

    def point(document: dict[str, Any]) -> None:
        if kind == "reports":
            document["reports"] = [entry]
        else:
            document["graphs"]["vim"][kind] = entry if kind == "file" else [entry]

    rewrite(folder, point)
    assert f"{kind}." in refusal(folder)


CHECKED = ["vim.onnx", "encoder.onnx.data", "parity.json"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_file_of_the_same_size_but_other_bytes_is_refused(name: str, folder: Path) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    line = refusal(folder)
    assert name in line
    assert "sha256" in line


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_cut_or_longer_file_is_refused(name: str, change: int, folder: Path) -> None:
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as stream:
        stream.truncate(size + change)
    line = refusal(folder)
    assert name in line
    assert str(size) in line
    assert str(size + change) in line


@pytest.mark.parametrize("name", CHECKED)
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    assert f"{name} is missing" in refusal(folder)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_missing_graph_is_named(graph: str, folder: Path) -> None:
    rewrite(folder, lambda document: document["graphs"].pop(graph))
    assert graph in refusal(folder)


def as_hugging_face_caches_it(folder: Path) -> None:
    """Every file in `blobs`, by its hash, and a link to it in the folder."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        file.symlink_to(os.path.relpath(blob, folder))


def as_kubernetes_mounts_it(folder: Path) -> None:
    """Every file in a folder with the time in its name, to which a link leads."""
    dated = folder / "..2026_11_29"
    dated.mkdir()
    (folder / "..data").symlink_to(dated.name)
    for file in [file for file in folder.iterdir() if file.is_file()]:
        file.rename(dated / file.name)
        file.symlink_to(Path("..data", file.name))


@pytest.mark.parametrize("lay_out", [as_hugging_face_caches_it, as_kubernetes_mounts_it])
def test_a_bundle_of_links_opens_and_its_contents_are_checked(lay_out: Callable[[Path], None], folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    lay_out(folder)
    assert (folder / "vim.onnx").is_symlink()
    assert Bundle.open(folder).manifest == manifest
    content = (folder / "vim.onnx").resolve()
    content.write_bytes(content.read_bytes()[:-1] + b"X")
    assert "vim.onnx has sha256" in refusal(folder)


@pytest.mark.parametrize("lay_out", [as_hugging_face_caches_it, as_kubernetes_mounts_it])
def test_a_bundle_of_links_is_replaced_and_what_they_lead_to_is_left_alone(
    lay_out: Callable[[Path], None], folder: Path
) -> None:
    lay_out(folder)
    blobs = {file: file.read_bytes() for file in folder.parent.glob("blobs/*")}
    build(folder, "new")
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert Bundle.open(folder).manifest.preset
    assert {file: file.read_bytes() for file in folder.parent.glob("blobs/*")} == blobs


@pytest.mark.parametrize("name", [*CHECKED, MANIFEST_NAME])
def test_a_dangling_link_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "nowhere")
    assert name in refusal(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [*CHECKED, MANIFEST_NAME])
def test_a_pipe_is_refused_and_never_waited_for(name: str, folder: Path) -> None:
    """A pipe has size 0; the manifest says so too, that only the kind of the file is left to refuse it for."""
    (folder / name).write_bytes(b"")
    empty = describe(folder / name)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name != MANIFEST_NAME:
        rewrite(folder, lambda document: replace_entry(document, name, empty))
    assert f"{name} is not a regular file" in refusal(folder)


def replace_entry(node: Any, name: str, entry: dict[str, Any]) -> None:
    if isinstance(node, dict):
        if node.get("name") == name and "sha256" in node:
            node.update(entry)
        for value in node.values():
            replace_entry(value, name, entry)
    elif isinstance(node, list):
        for value in node:
            replace_entry(value, name, entry)


@pytest.mark.parametrize("name", [*CHECKED, MANIFEST_NAME])
def test_a_folder_in_place_of_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refusal(folder)


# ------------------------------------------------------------------------------------------------------- random damage

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too: JSON can carry them
JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(ANY_CHARACTER),
        st.sampled_from([1, 64, "vim.onnx", MANIFEST_NAME, "../manifest.json", "0" * 64, "fp16", "image"]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(ANY_CHARACTER), inner, max_size=3),
    max_leaves=6,
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield node, key
        yield from places(value)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = fill(tmp_path_factory.mktemp("victim"))
    return folder, json.loads((folder / MANIFEST_NAME).read_text())


@settings(max_examples=250, derandomize=True)
@given(data=st.data())
def test_any_mutation_of_a_manifest_opens_or_is_a_bundle_error(
    data: st.DataObject, victim: tuple[Path, dict[str, Any]]
) -> None:
    folder, valid = victim
    document = copy.deepcopy(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        node, key = data.draw(st.sampled_from(list(places(document))))
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[key] = data.draw(JSON)
            case "remove":
                del node[key]
            case "add" if isinstance(node, dict):
                node[data.draw(st.text(ANY_CHARACTER))] = data.draw(JSON)
            case "add":
                node.append(data.draw(JSON))
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    with contextlib.suppress(BundleError):
        Bundle.open(folder)


@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_any_change_of_a_manifests_bytes_opens_or_is_a_bundle_error(
    data: st.DataObject, victim: tuple[Path, dict[str, Any]]
) -> None:
    folder, valid = victim
    raw = bytearray(json.dumps(valid).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    (folder / MANIFEST_NAME).write_bytes(raw)
    with contextlib.suppress(BundleError):
        Bundle.open(folder)


# ------------------------------------------------------------------------------------------------------------ writing


def test_a_new_bundle_appears_whole_with_the_parents_it_needs(tmp_path: Path) -> None:
    destination = tmp_path / "a" / "b" / "mdnet-bundle"
    with write_bundle(destination) as scratch:
        assert not destination.exists()
        fill(scratch)
    assert names(destination) == FILES
    Bundle.open(destination)
    assert names(destination.parent) == ["mdnet-bundle"]


def test_a_relative_destination_is_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build("out/")
    assert Bundle.open(tmp_path / "out").manifest.preset == "demo"


def test_an_existing_bundle_is_replaced_with_nothing_of_it_left(folder: Path) -> None:
    (folder / "stale.plan").write_bytes(b"of the old bundle")
    build(folder, "new")
    assert names(folder) == FILES
    assert Bundle.open(folder).manifest.preset == "new"
    assert names(folder.parent) == ["mdnet-bundle"]


def test_a_broken_bundle_can_be_rebuilt_in_place(folder: Path) -> None:
    """What the error messages advise."""
    (folder / "vim.onnx").unlink()
    rewrite(folder, lambda document: document.update(schema_version=0))
    build(folder, "new")
    assert Bundle.open(folder).manifest.preset == "new"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    build(tmp_path / "out")
    assert Bundle.open(tmp_path / "out").manifest.preset == "demo"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("start", ["empty", "bundle"])
def test_the_current_folder_can_be_the_destination(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mdnet-export build -o .`: the shell that called must not end up in a deleted folder."""
    (tmp_path / "here").mkdir()
    if start == "bundle":
        fill(tmp_path / "here", "old")
    monkeypatch.chdir(tmp_path / "here")
    try:
        build(".", "new")
    except UsageError:
        assert names(Path()) == ([] if start == "empty" else FILES)
        return  # to refuse is as good
    assert Bundle.open(".").manifest.preset == "new"


def test_a_link_to_a_bundle_stays_and_what_it_points_to_is_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to("../mdnet-bundle")
    build(link, "new")
    assert link.readlink() == Path("../mdnet-bundle")
    assert not folder.is_symlink()
    assert Bundle.open(folder).manifest.preset == "new"
    assert names(link.parent) == ["current"]


def test_a_dangling_link_is_given_its_folder(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("v2")
    build(tmp_path / "current")
    assert (tmp_path / "current").is_symlink()
    assert Bundle.open(tmp_path / "v2").manifest.preset == "demo"


def _file(path: Path) -> None:
    path.write_bytes(b"mine")


def _photos(path: Path) -> None:
    path.mkdir()
    (path / "holiday.jpg").write_bytes(b"mine")


def _hidden(path: Path) -> None:
    path.mkdir()
    (path / ".git").write_bytes(b"mine")


def _other_manifest(path: Path) -> None:
    """`manifest.json` is also what web apps and browser extensions call theirs."""
    path.mkdir()
    (path / MANIFEST_NAME).write_text('{"name": "my extension", "manifest_version": 3, "version": "1.0"}')
    (path / "background.js").write_bytes(b"mine")


def _folder_called_manifest(path: Path) -> None:
    (path / MANIFEST_NAME).mkdir(parents=True)


FOREIGN = [_file, _photos, _hidden, _other_manifest, _folder_called_manifest]


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in [root, *root.rglob("*")]}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__.lstrip("_"))
def test_what_is_not_a_bundle_is_left_alone(make: Callable[[Path], None], tmp_path: Path) -> None:
    destination = tmp_path / "mine"
    make(destination)
    before = snapshot(tmp_path)
    entered = False
    with pytest.raises(UsageError, match="mine"), write_bundle(destination) as scratch:  # noqa: PT012
        entered = True
        fill(scratch)
    assert not entered, "the work is done before the refusal"
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_called_manifest_is_never_waited_for_by_a_build(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    os.mkfifo(tmp_path / "mine" / MANIFEST_NAME)
    refused = threading.Event()

    def target() -> None:
        with contextlib.suppress(UsageError):
            build(tmp_path / "mine")
            return
        refused.set()

    threading.Thread(target=target, daemon=True).start()
    assert refused.wait(timeout=60)


@pytest.mark.parametrize("make", [_file, _photos], ids=lambda make: make.__name__.lstrip("_"))
def test_what_appears_while_the_bundle_is_built_is_left_alone(make: Callable[[Path], None], tmp_path: Path) -> None:
    """A build takes minutes: what was free at its start may be somebody's at its end."""
    destination = tmp_path / "mine"
    with pytest.raises((UsageError, OSError)), write_bundle(destination) as scratch:  # noqa: PT012
        fill(scratch)
        make(destination)
        before = snapshot(destination)
    assert snapshot(destination) == before
    assert names(tmp_path) == ["mine"]


class Stop(BaseException):
    """Not an `Exception`, as KeyboardInterrupt and SystemExit are not."""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("error", [ValueError("bad graph"), KeyboardInterrupt(), Stop(), SystemExit(1)], ids=repr)
def test_a_block_that_fails_leaves_nothing(error: BaseException, existing: bool, tmp_path: Path) -> None:
    destination = tmp_path / "mdnet-bundle"
    if existing:
        build(destination, "old")
    before = snapshot(tmp_path)
    with pytest.raises(type(error)), write_bundle(destination) as scratch:  # noqa: PT012
        fill(scratch, "new")
        raise error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_last_step_that_fails_leaves_nothing(
    error: BaseException, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may report a full disk only when the data is flushed."""
    destination = tmp_path / "mdnet-bundle"
    if existing:
        build(destination, "old")
    before = snapshot(tmp_path)

    def fsync(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(type(error)):
        build(destination, "new")
    assert snapshot(tmp_path) == before


def test_every_file_is_on_the_disk_before_the_bundle_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename can reach the disk before the data does: after a power cut there would be a bundle of empty files."""
    destination = tmp_path / "mdnet-bundle"
    flushed: set[int] = set()

    def fsync(descriptor: int) -> None:
        if not destination.exists():
            flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    build(destination)
    assert {file.stat().st_ino for file in destination.iterdir()} <= flushed


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from mdnet_engines.bundle.files import write_bundle

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

when, destination, files = sys.argv[1:]
if when == "at the flush":
    os.fsync = die
if when == "after the swap":
    shutil.rmtree = die
with write_bundle(destination) as scratch:
    for file in Path(files).iterdir():
        shutil.copy(file, scratch)
        if when == "half-way":
            die()
        if when == "half-way, by _exit":
            os._exit(3)
"""


@pytest.mark.parametrize(
    ("when", "left"),
    [("half-way", "old"), ("half-way, by _exit", "old"), ("at the flush", "old"), ("after the swap", "new")],
)
def test_a_killed_process_leaves_one_whole_bundle(when: str, left: str, folder: Path, tmp_path: Path) -> None:
    fill(folder, "old")
    (tmp_path / "new").mkdir()
    fill(tmp_path / "new", "new")
    command = [sys.executable, "-c", KILLED, when, str(folder), str(tmp_path / "new")]
    assert subprocess.run(command, timeout=60).returncode in (-signal.SIGKILL, 3)
    assert Bundle.open(folder).manifest.preset == left
    assert names(folder) == FILES
    rest = set(names(tmp_path)) - {"mdnet-bundle", "new"}
    assert all(name.startswith(".") for name in rest)  # scratch that nobody takes for a bundle
    build(folder, "next")  # and that is in nobody's way
    assert Bundle.open(folder).manifest.preset == "next"


def test_two_builds_of_the_same_bundle_leave_one_of_them_whole(tmp_path: Path) -> None:
    destination = tmp_path / "mdnet-bundle"
    with write_bundle(destination) as first:
        fill(first, "first")
        build(destination, "second")
        assert Bundle.open(destination).manifest.preset == "second"
    assert Bundle.open(destination).manifest.preset == "first"
    assert names(tmp_path) == ["mdnet-bundle"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no call that swaps two folders")
def test_a_reader_never_finds_the_bundle_missing_while_it_is_replaced(folder: Path) -> None:
    stop = threading.Event()
    seen: set[str] = set()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(json.loads((folder / MANIFEST_NAME).read_bytes())["preset"])
            except BaseException as error:
                failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(60):
            build(folder, f"version{number}")
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]
    assert len(seen) > 3  # it did look


@pytest.mark.parametrize("after", range(len(FILES) - 1))
def test_a_bundle_replaced_while_it_is_opened_is_the_old_or_the_new_one(
    after: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both bundles are good: a reader that meets the swap gets one of them, not `it was altered`."""
    left = after

    def swap_then_hash(file: Path) -> str:
        nonlocal left
        if left == 0:
            monkeypatch.setattr(bundle_module, "sha256_of", sha256_of)
            build(folder, "new")
        left -= 1
        return sha256_of(file)

    monkeypatch.setattr(bundle_module, "sha256_of", swap_then_hash)
    bundle = Bundle.open(folder)
    assert bundle.manifest.preset in ("demo", "new")


def test_a_bundle_replaced_by_one_with_fewer_files_while_it_is_opened_is_the_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large weights lie beside the graph, small ones in it: a file can go between the look at it and its reading."""

    def swap_then_hash(file: Path) -> str:
        if file.name == "encoder.onnx.data":
            monkeypatch.setattr(bundle_module, "sha256_of", sha256_of)
            with write_bundle(folder) as scratch:
                fill(scratch, "new")
                (scratch / file.name).unlink()
                rewrite(scratch, lambda document: document["graphs"]["encoder"].update(data=[]))
        return sha256_of(file)

    monkeypatch.setattr(bundle_module, "sha256_of", swap_then_hash)
    assert Bundle.open(folder).manifest.preset == "new"


@pytest.mark.skipif(os.name != "posix", reason="this system has no file modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700), (0o002, 0o775)], ids=oct)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_permissions_follow_the_umask(umask: int, mode: int, existing: bool, tmp_path: Path) -> None:
    """Not those of a temporary folder, which only its owner can enter."""
    destination = tmp_path / "mdnet-bundle"
    if existing:
        build(destination)
        destination.chmod(0o711)
    before = os.umask(umask)
    try:
        build(destination)
    finally:
        left = os.umask(before)
    assert left == umask
    assert destination.stat().st_mode & 0o777 == mode
    assert {file.stat().st_mode & 0o777 for file in destination.iterdir()} == {mode & 0o666}


NO_EXCHANGE = {
    "no_such_function": SimpleNamespace(),
    "refused_by_the_file_system": SimpleNamespace(renameat2=lambda *args: -1),
}


@pytest.mark.skipif(os.name != "posix", reason="ctypes is not asked there")
@pytest.mark.parametrize("library", NO_EXCHANGE)
def test_a_bundle_is_replaced_where_folders_cannot_be_swapped(
    library: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: NO_EXCHANGE[library])
    build(folder, "new")
    assert Bundle.open(folder).manifest.preset == "new"
    assert names(folder.parent) == ["mdnet-bundle"]


@pytest.mark.skipif(os.name != "posix", reason="ctypes is not asked there")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("failing", [1, 2])
def test_a_replacement_in_steps_that_fails_puts_the_old_bundle_back(
    failing: int, error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    before = snapshot(folder)
    rename, calls = Path.rename, 0

    def failing_rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(type(error)):
        build(folder, "new")
    assert snapshot(folder) == before


@pytest.mark.skipif(os.name != "posix", reason="ctypes is not asked there")
def test_an_old_bundle_that_cannot_be_put_back_is_not_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every rename after the first one fails, the old bundle is the only good one: it stays, if elsewhere."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace())
    weights = (folder / "encoder.onnx.data").read_bytes()
    rename, calls = Path.rename, 0

    def rename_once(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(OSError, match="Input/output error"):
        build(folder, "new")
    assert weights in [file.read_bytes() for file in folder.parent.rglob("encoder.onnx.data")]


def test_a_bundle_copied_elsewhere_still_opens(folder: Path, tmp_path: Path) -> None:
    """Nothing in it names the place where it was made."""
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    assert Bundle.open(tmp_path / "copy").path == tmp_path / "copy"
