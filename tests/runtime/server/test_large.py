"""Large images: decoded elsewhere, to the same pixels; bounded, stoppable, and in nobody's way."""

from __future__ import annotations

import contextlib
import io
import os
import queue
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import Decoded, ImageError, decode
from mdnet_rt.server import large
from mdnet_rt.server.large import Job, LargeDecoders, LargeError, refuse_large

SIZE = 32
DEADLINE = 30
OPTIONS = {"size": SIZE, "to_srgb": True, "max_pixels": 25_000_000}


def encoded(width: int, height: int, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width // 10, height // 10), 90).resize((width, height)).convert("RGB").save(
        stream, format, **options
    )
    return stream.getvalue()


@pytest.fixture
def decoders() -> Iterator[LargeDecoders]:
    made = LargeDecoders(1, DEADLINE)
    yield made
    made.close()


def result(
    decoders: LargeDecoders, data: bytes, *, unwanted: bool = False, face: float | None = None
) -> Decoded | ImageError:
    answers: queue.SimpleQueue[Decoded | ImageError] = queue.SimpleQueue()
    decoders.put(Job(data, OPTIONS, lambda: unwanted, answers.put, face))
    return answers.get(timeout=DEADLINE)


def is_large(data: bytes) -> bool:
    try:
        decode(data, SIZE, admit=refuse_large)
    except LargeError:
        return True
    return False


def test_what_takes_long_to_decode_is_large() -> None:
    assert not is_large(encoded(1500, 1500))
    assert is_large(encoded(2000, 2000))
    assert is_large(encoded(1000, 1000, "JPEG2000"))  # whose decoder lets nothing else run
    assert not is_large(encoded(2000, 2000, "JPEG"))  # decoded at an eighth
    assert is_large(encoded(2000, 2000, "JPEG", progressive=True))  # held at its full size all the same


def test_a_large_image_gets_the_pixels_that_it_gets_elsewhere(decoders: LargeDecoders) -> None:
    data = encoded(2100, 1900)
    found, expected = result(decoders, data), decode(data, SIZE)
    assert isinstance(found, Decoded)
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert found[1:] == expected[1:] == (2100, 1900, None)


def test_a_large_image_is_framed_as_a_small_one(decoders: LargeDecoders) -> None:
    with Image.open(Path(__file__).parents[2] / "data" / "portrait.jpg") as portrait:
        portrait.resize((1900, 1900)).save(stream := io.BytesIO(), "PNG")
    found = result(decoders, stream.getvalue(), face=1.2)
    assert isinstance(found, Decoded)
    expected = decode(stream.getvalue(), SIZE, find_box=face_finder(1.2))
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    nobody = result(decoders, encoded(2000, 2000), face=1.2)
    assert isinstance(nobody, ImageError)
    assert (nobody.status, str(nobody)) == ("no_face", "no face found")


def test_a_bad_image_has_its_reason_and_the_next_is_decoded(decoders: LargeDecoders) -> None:
    data = encoded(2000, 2000)
    for bad, reason in ((data[:5000], "truncated ("), (b"text", "not an image"), (b"", "empty file")):
        found = result(decoders, bad)
        assert isinstance(found, ImageError)
        assert str(found).startswith(reason)
    assert isinstance(result(decoders, data), Decoded)


def test_what_nobody_waits_for_is_not_decoded(decoders: LargeDecoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # no process is started for it
    assert str(result(decoders, encoded(100, 100), unwanted=True)) == "nobody waits for it"


def children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread may end at any moment
            found += map(int, (task / "children").read_text().split())
    return found


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_a_process_that_dies_costs_its_image_alone(decoders: LargeDecoders) -> None:
    before = set(children())
    assert isinstance(result(decoders, encoded(100, 100)), Decoded)
    (child,) = set(children()) - before
    os.kill(child, signal.SIGKILL)
    assert "its decoder failed" in str(result(decoders, encoded(100, 100)))
    assert isinstance(result(decoders, encoded(100, 100)), Decoded)


def test_a_decoder_that_takes_too_long_is_stopped() -> None:
    decoders = LargeDecoders(1, 0.01)  # less than a process takes to start
    assert "took longer than 0.01 s" in str(result(decoders, encoded(100, 100)))
    decoders.close()


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs Linux's /proc")
def test_a_process_with_nothing_to_do_ends_and_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_IDLE", 0.05)
    before = set(children())
    decoders = LargeDecoders(1, DEADLINE)
    assert isinstance(result(decoders, encoded(100, 100)), Decoded)
    end = time.monotonic() + DEADLINE
    while set(children()) - before:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert isinstance(result(decoders, encoded(100, 100)), Decoded)
    decoders.close()
