"""Metadata of a PNG, whatever its size and state, never costs the pixels; and what it may cost is bounded."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from pngs import chunk

from mdnet_rt.images.png import MAX_CHUNKS, without_baggage
from mdnet_rt.images.preprocess import ImageError, load_image, preprocess

SIZE = 32
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
RESERVE = 16 * 2**20


def png(*chunks: bytes, behind: bool = False, **options: object) -> bytes:
    """A PNG of `PIXELS` with more chunks, before the pixels or `behind` them."""
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", **options)
    data = stream.getvalue()
    at = data.index(b"IEND" if behind else b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


BIG = b"x" * (3 << 20)
CASES = {
    "tEXt of 3 MiB": [chunk(b"tEXt", b"workflow\0" + BIG)],
    "zTXt of 3 MiB": [chunk(b"zTXt", b"workflow\0\0" + zlib.compress(BIG))],
    "iTXt of 3 MiB": [chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(BIG))],
    "plain iTXt of 3 MiB": [chunk(b"iTXt", b"workflow\0\0\0\0\0" + BIG)],
    "100 texts of 1 MiB": [chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(BIG[: 1 << 20])) for i in range(100)],
    "profile of 3 MiB": [chunk(b"iCCP", b"p\0\0" + zlib.compress(os.urandom(100) + BIG))],
    "profile that is cut": [chunk(b"iCCP", b"p\0\0" + zlib.compress(BIG)[:50])],
    "profile of no method": [chunk(b"iCCP", b"p\0\7abc")],
    "profile of nothing": [chunk(b"iCCP", b"")],
    "bad checksum": [chunk(b"tEXt", b"a\0b", checksum=bytes(4))],
    "bad checksum of EXIF": [chunk(b"eXIf", b"MM\0*", checksum=bytes(4))],
    "bad checksum of a private chunk": [chunk(b"prVt", b"abc", checksum=bytes(4))],
    "chunks that are too short": [chunk(kind, b"1") for kind in (b"cHRM", b"gAMA", b"pHYs")] + [chunk(b"sRGB", b"")],
    "animation out of order": [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", bytes(26))],
    "text of an unknown method": [chunk(b"zTXt", b"a\0\7abc")],
}


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("name", CASES)
def test_metadata_does_not_cost_the_pixels(name: str, behind: bool) -> None:
    np.testing.assert_array_equal(load_image(png(*CASES[name], behind=behind), SIZE), preprocess(PIXELS, SIZE))


def test_metadata_that_ends_a_file_does_not_cost_the_pixels() -> None:
    data = png(chunk(b"tEXt", b"workflow\0" + BIG), behind=True)
    np.testing.assert_array_equal(load_image(data[: len(data) - (1 << 20)], SIZE), preprocess(PIXELS, SIZE))


def test_plain_metadata_is_left_where_it_is_and_orientation_is_heeded() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(chunk(b"tEXt", b"a\0b"), exif=exif, dpi=(72, 72))
    stream = io.BytesIO(data)
    assert without_baggage(stream)[0] is stream
    turned = preprocess(np.rot90(PIXELS, 3).copy(), SIZE)
    np.testing.assert_array_equal(load_image(data, SIZE), turned)
    np.testing.assert_array_equal(load_image(png(*CASES["zTXt of 3 MiB"], exif=exif), SIZE), turned)


def test_a_bomb_of_text_or_profile_is_never_unpacked() -> None:
    bomb = zlib.compress(bytes(200 * 2**20), 9)
    data = png(chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb))
    tracemalloc.start()
    pixels = load_image(data, SIZE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(pixels, preprocess(PIXELS, SIZE))
    assert peak < RESERVE


def test_a_file_of_nothing_but_chunks_is_refused_after_so_many() -> None:
    with pytest.raises(ImageError, match=f"more than {MAX_CHUNKS} chunks"):
        load_image(png(chunk(b"tEXt", b"") * (MAX_CHUNKS + 1)), SIZE)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"PLTE"])
def test_damage_to_what_pixels_are_made_of_is_still_told(kind: bytes) -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).quantize(16).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[data.index(kind) + 5] ^= 1
    with pytest.raises(ImageError):
        load_image(bytes(data), SIZE)
