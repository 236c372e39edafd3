"""Histograms on disk: used only where they are of this graph and these images, and never a reason to fail."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mdnet_calib.cache import histograms
from mdnet_calib.ranges import Histogram

GRAPH, IMAGES = "a" * 64, "b" * 64
NAMES = ("conv/a", "conv/b", "düse")


class Spy:
    """Computes histograms of three tensors, and counts how often it was asked to."""

    def __init__(self, names: tuple[str, ...] = NAMES):
        self.names, self.calls = names, 0

    def __call__(self) -> dict[str, Histogram]:
        self.calls += 1
        made = {name: Histogram() for name in self.names}
        for i, histogram in enumerate(made.values()):
            histogram.add(np.random.default_rng(i).normal(size=2000).astype(np.float32) * 10.0**i)
            histogram.add(np.array([12345.678 * 10.0**i]))
        return made


def ask(
    folder: Path | None,
    collect: Callable[[], dict[str, Histogram]],
    tensors: tuple[str, ...] = NAMES,
    graph: str = GRAPH,
    images: str = IMAGES,
) -> tuple[dict[str, Histogram], bool]:
    return histograms(folder, graph=graph, images=images, tensors=tensors, collect=collect)


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def assert_same(got: dict[str, Histogram], expected: dict[str, Histogram]) -> None:
    assert got.keys() == expected.keys()
    for name, histogram in expected.items():
        assert (got[name].limit, got[name].largest) == (histogram.limit, histogram.largest)
        np.testing.assert_array_equal(got[name].counts, histogram.counts)


def test_a_second_build_on_the_same_images_computes_nothing(tmp_path: Path) -> None:
    spy = Spy()
    fresh, cached = ask(tmp_path / "new" / "cache", spy)
    assert not cached
    again, cached = ask(tmp_path / "new" / "cache", spy)
    assert cached
    assert spy.calls == 1
    assert_same(again, fresh)
    again["conv/a"].add(np.array([1e9]))  # it is a histogram like another
    assert again["conv/a"].largest == 1e9


def test_without_a_folder_nothing_is_kept() -> None:
    spy = Spy()
    assert [ask(None, spy)[1], ask(None, spy)[1], spy.calls] == [False, False, 2]


@pytest.mark.parametrize("other", ["c" * 64, "a" * 63 + "c", "a" * 16 + "c" * 48])
def test_another_graph_or_other_images_are_computed_anew(other: str, tmp_path: Path) -> None:
    """Also where the digests begin alike, as the file's name shows no more."""
    spy = Spy()
    ask(tmp_path, spy)
    assert not ask(tmp_path, spy, graph=other)[1]
    ask(tmp_path, spy)
    assert not ask(tmp_path, spy, images=other.replace("a", "b"))[1]


def test_fewer_tensors_are_served_and_more_are_computed(tmp_path: Path) -> None:
    spy = Spy()
    ask(tmp_path, spy)
    found, cached = ask(tmp_path, spy, tensors=("düse",))
    assert cached
    assert_same(found, {"düse": Spy()()["düse"]})
    larger = Spy((*NAMES, "new"))
    assert not ask(tmp_path, larger, tensors=("new",))[1]
    assert ask(tmp_path, larger, tensors=larger.names)[1]
    assert larger.calls == 1


# --- what is not a whole file ---


def assert_replaced(folder: Path) -> None:
    """What lies there counts as missing, without an error, and a good file takes its place."""
    spy = Spy()
    found, cached = ask(folder, spy)
    assert not cached
    assert_same(found, Spy()())
    assert ask(folder, spy)[1]
    assert spy.calls == 1


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_cut_file_counts_as_missing(kept: float, tmp_path: Path) -> None:
    ask(tmp_path, Spy())
    file = only_file(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    assert_replaced(tmp_path)


@pytest.mark.parametrize("garbage", [b"not an archive", b"PK\x03\x04" + bytes(500), bytes(5000), b"\x93NUMPY"])
def test_another_kind_of_file_counts_as_missing(garbage: bytes, tmp_path: Path) -> None:
    ask(tmp_path, Spy())
    only_file(tmp_path).write_bytes(garbage)
    assert_replaced(tmp_path)


def test_a_damaged_byte_anywhere_is_no_error(tmp_path: Path) -> None:
    """What still reads as it was is served; every other damage counts as missing."""
    ask(tmp_path, Spy())
    file = only_file(tmp_path)
    whole = file.read_bytes()
    for position in range(0, len(whole), 17):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        assert_same(ask(tmp_path, Spy())[0], Spy()())


@pytest.mark.parametrize("layout", ["npy", "scalar names"])
def test_another_layout_counts_as_missing(layout: str, tmp_path: Path) -> None:
    ask(tmp_path, Spy())
    file = only_file(tmp_path)
    with np.load(file) as arrays:
        parts = dict(arrays)
    with file.open("wb") as stream:
        if layout == "npy":
            np.save(stream, np.zeros(3))
        else:
            np.savez(stream, **{**parts, "names": np.array("conv/a")})
    assert_replaced(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"key": np.array(f"0 {GRAPH} {IMAGES}")},  # an older layout
        {"counts": np.zeros((3, 128), np.int64)},
        {"bounds": np.zeros((2, 2))},
        {"names": np.array(["conv/a"])},
        {"counts": np.array([[None] * 2048] * 3)},
    ],
    ids=["version", "bins", "bounds", "names", "pickle"],
)
def test_other_contents_count_as_missing(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    ask(tmp_path, Spy())
    file = only_file(tmp_path)
    with np.load(file) as arrays:
        parts = dict(arrays)
    with file.open("wb") as stream:
        np.savez(stream, **{**parts, **change})
    assert_replaced(tmp_path)


# --- writing ---


def test_a_failure_while_writing_leaves_the_old_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(tmp_path, Spy(("conv/a",)), tensors=("conv/a",))
    file = only_file(tmp_path)
    before = file.read_bytes()

    def full_disk(stream: object, **_: object) -> None:
        stream.write(before[:100])  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):  # the command line makes one line of it
        ask(tmp_path, Spy())
    assert only_file(tmp_path) == file
    assert file.read_bytes() == before


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path: Path) -> None:
    barrier = threading.Barrier(4)

    def collect() -> dict[str, Histogram]:
        barrier.wait(timeout=60)
        return Spy()()

    threads = [threading.Thread(target=ask, args=(tmp_path, collect)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    only_file(tmp_path)
    found, cached = ask(tmp_path, Spy())
    assert cached
    assert_same(found, Spy()())


WRITES_FOR_EVER = """
import sys, pathlib, numpy
from mdnet_calib.cache import histograms
from mdnet_calib.ranges import Histogram
folder, made = pathlib.Path(sys.argv[1]), Histogram()
made.add(numpy.ones(5))
while True:
    for file in folder.glob("ranges-*"):
        file.unlink()
    histograms(folder, graph="a" * 64, images="b" * 64, tensors=["conv/a"], collect=lambda: {"conv/a": made})
"""


def test_a_killed_writer_leaves_nothing_that_reads_as_a_cache(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("*ranges-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    found, _ = ask(tmp_path, Spy())
    assert_same(found, Spy()())


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_can_not_be_is_an_os_error(folder: str, tmp_path: Path) -> None:
    """Of the kind that the command line explains in one line."""
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(OSError, match=r"exists|[Nn]ot a directory"):
        ask(tmp_path / folder, Spy())
    assert (tmp_path / "file").read_text() == "years of work"
