"""The images that a benchmark runs on: the user's, or JPEGs of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from mdnet_engines.errors import UsageError, printable
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import ImageError, load_image
from mdnet_rt.sources.entry import Entry
from mdnet_rt.sources.locations import find_locations, read_locations

_GRAIN = 5.0  # levels: what a sensor's noise leaves; 350x350 then takes the 30 kB that such photographs have


def make_jpegs(count: int, width: int, height: int, seed: int = 0) -> list[Entry]:
    """JPEGs whose energy is in low frequencies, as a photograph's is; the same for the same seed.

    White noise would not do: its files are several times as long, and decoding takes as much longer.
    """
    random = np.random.default_rng(seed)
    return [Entry(f"made {i}", _make_jpeg(random, width, height)) for i in range(count)]


def take_images(
    locations: Sequence[str], count: int, size: int, *, face: float | None = None
) -> tuple[list[Entry], int]:
    """The first `count` images at `locations` that can be decoded, and how many were passed over before.

    Files stay files; what comes out of an archive or over the network is held in memory.

    Raises:
        UsageError: nothing exists there, or none of it can be decoded.
    """
    good: list[Entry] = []
    skipped, reason = 0, ""
    for entry in map(fetch, read_locations(find_locations(locations))):
        try:
            decode(entry, size, face=face)
        except ImageError as error:
            skipped += 1
            reason = reason or f"{printable(entry.name)}: {error}"
            continue
        good.append(entry)
        if len(good) == count:
            break
    if not good:
        raise UsageError(f"none of the {skipped} images can be read ({reason}); a benchmark needs one")
    return good, skipped


def fetch(entry: Entry) -> Entry:
    """`entry` without a download in it, so that it can be decoded again and again."""
    if not callable(entry.data):
        return entry
    try:
        return replace(entry, data=entry.data())
    except ImageError as error:
        return replace(entry, data=error)


def decode(entry: Entry, size: int, *, to_srgb: bool = True, face: float | None = None) -> np.ndarray:
    """What `fetch` or `make_jpegs` gave → uint8 `[size, size, 3]`; `to_srgb` and `face` as a manifest has them.

    Raises:
        ImageError: it can't be decoded, or could not be fetched.
    """
    if isinstance(entry.data, ImageError):
        raise entry.data
    assert not callable(entry.data)
    return load_image(entry.data, size, find_box=face_finder(face), to_srgb=to_srgb)


def _make_jpeg(random: np.random.Generator, width: int, height: int) -> bytes:
    pixels = np.full((height, width, 3), 128, np.float32)
    for octave in range(4):  # each finer and weaker than the one before, as natural images fall off
        side = 4 << octave
        coarse = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        fine = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        pixels += (fine - 128) / (2 << octave)
    pixels += _GRAIN * random.standard_normal((height, width, 1), np.float32)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
