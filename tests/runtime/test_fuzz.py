"""Mutated bytes into every parser of the runtime: what comes out is a value or the one error that is promised.

Seeds are mutated by a seeded generator that knows nothing of the formats (bits, bytes, copies, cuts, lengths set to
extremes), which reaches deeper than arbitrary bytes would. A case that fails is named by its number, and its bytes are
in the file `case` of the test's folder, where a crash of the process leaves them too.

`MDNET_FUZZ=20` runs ten times as many cases (the default, 2, takes about a minute in all), `MDNET_FUZZ_SEED=7`
draws others, `MDNET_FUZZ_ONLY=123` runs just case 123 of each test.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from mdnet_engines.bundle.files import Bundle, read_manifest
from mdnet_engines.bundle.manifest import MANIFEST_NAME, Manifest
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_rt.images.preprocess import MAX_PIXELS, ImageError, decode
from mdnet_rt.rows.encoding import RowFormat, encode, header, read_rows
from mdnet_rt.rows.result import Result, Stamp
from mdnet_rt.sources import archives
from mdnet_rt.sources.archives import read_archive
from mdnet_rt.sources.entry import Entry

pytestmark = pytest.mark.slow
FACTOR = float(os.environ.get("MDNET_FUZZ", "2"))
SEED = int(os.environ.get("MDNET_FUZZ_SEED", "0"))
ONLY = os.environ.get("MDNET_FUZZ_ONLY")
SIZE = 32
STUCK = 60  # seconds after which one case counts as endless

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def mutated(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """`data` with one to eight things done to it, near its beginning more often than not."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([64, 600, len(out)])))
        length = rng.choice([1, 2, 4, 16, 200])
        match rng.randrange(9):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.randrange(256)
            case 2:
                out[at : at + length] = rng.randbytes(length)
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length] * rng.choice([1, 1, 50])
            case 5:
                del out[at:]
            case 6:
                order, kind = rng.choice("<>"), rng.choice("BHI")
                value = rng.choice(EXTREMES) & (256 ** struct.calcsize(kind) - 1)
                out[at : at + struct.calcsize(kind)] = struct.pack(order + kind, value)
            case 7:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                out[at : at + length] = other[start : start + length]
            case 8:
                digits = [i for i in range(at, min(at + 300, len(out))) if chr(out[i]) in "0123456789"]
                for i in digits[: rng.randrange(1, 12)]:
                    out[i] = rng.choice(b"0123456789-")
    return bytes(out)


def with_png_checksums(data: bytes) -> bytes:
    """A mutant of a PNG whose chunks, as far as they can be followed, have the right checksums."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out[: len(data) + 4])


def with_tar_checksums(data: bytes) -> bytes:
    """A mutant of a tar archive whose headers have the right checksums."""
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        if out[at + 257 : at + 262] == b"ustar":
            out[at + 148 : at + 156] = b" " * 8
            out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


@contextmanager
def reproducible(kept: BinaryIO, case: int, data: bytes) -> Iterator[None]:
    """Keep a case's bytes, say that it failed, and end it where it is endless."""

    def late(*_: object) -> None:
        raise BaseException("endless")  # past the handlers that turn every exception into a row

    kept.seek(0)  # one file for all cases: to write one for each takes longer than most cases do
    kept.write(data)
    kept.truncate()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(STUCK)
    try:
        yield
    except BaseException as error:
        pytest.fail(f"MDNET_FUZZ_SEED={SEED} MDNET_FUZZ_ONLY={case}: {error!r}; the bytes are in {kept.name}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    folder: Path,
    seeds: list[bytes],
    count: int,
    check: Callable[[bytes], bool],
    repair: Callable[[bytes], bytes] = bytes,
) -> None:
    """Call `check` with `count` mutants of `seeds` (times `MDNET_FUZZ`), half of them behind `repair`.

    `check` raises where something is wrong, and tells whether the bytes were accepted: if all or none were, the
    mutations are too weak or too strong to test anything.
    """
    cases = [int(ONLY)] if ONLY else range(round(count * FACTOR))
    accepted = 0
    with (folder / "case").open("wb", buffering=0) as kept:
        for case in cases:
            rng = random.Random(f"{SEED} {case}")
            data = mutated(rng.choice(seeds), rng, seeds)
            data = repair(data) if rng.random() < 0.5 else data
            with reproducible(kept, case, data):
                accepted += check(data)
    print(f"{accepted} of {len(cases)} accepted")
    assert ONLY or 0 < accepted < len(cases)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def images_of(format: str) -> list[bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    flat = noise.resize((100, 80))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    profile = bytes(random.Random(0).randbytes(300))
    frames = {"save_all": True, "append_images": [flat.rotate(90), flat.rotate(180)]}
    grey16 = Image.fromarray(np.random.default_rng(0).integers(0, 2**16, (20, 20)).astype(np.uint16))
    seeds: dict[str, list[tuple[Image.Image, dict[str, object]]]] = {
        "JPEG": [
            (noise, {"exif": exif}),
            (flat, {"progressive": True, "icc_profile": profile}),
            (noise.convert("CMYK"), {}),
            (noise.convert("L"), {"restart_marker_blocks": 2}),
        ],
        "PNG": [
            (noise, {"exif": exif}),
            (flat.convert("P"), {"transparency": 3}),
            (noise.convert("RGBA"), {"icc_profile": profile}),
            (grey16, {}),
            (flat, frames),
        ],
        "WEBP": [(noise, {"exif": exif}), (flat.convert("RGBA"), {"lossless": True}), (flat, frames)],
        "TIFF": [
            (noise, {}),
            (flat, {"compression": "tiff_lzw"}),
            (flat, {"compression": "tiff_adobe_deflate"}),
            (noise, {"compression": "jpeg"}),
            (noise.convert("1"), {"compression": "group4"}),
            (grey16, {}),
            (flat, frames),
        ],
        "GIF": [(flat.convert("P"), {"transparency": 3}), (flat, frames), (flat, {"interlace": True})],
        "BMP": [(noise, {}), (flat.convert("P"), {}), (noise.convert("1"), {}), (noise.convert("RGBA"), {})],
        "PPM": [(noise, {}), (grey16, {}), (noise.convert("1"), {})],
        "AVIF": [(noise, {}), (noise.convert("RGBA"), {})],
        "JPEG2000": [(noise, {}), (noise.convert("LA"), {"irreversible": True})],
    }
    return [encoded(image, format, **options) for image, options in seeds[format]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_mutated_images_are_decoded_or_refused(tmp_path: Path, format: str) -> None:
    def check(data: bytes) -> bool:
        try:
            pixels, width, height, _ = decode(data, SIZE)
        except ImageError as error:
            assert str(error)
            assert "\n" not in str(error)
            return False
        assert (pixels.shape, pixels.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert 0 < width * height <= MAX_PIXELS
        return True

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fuzz(tmp_path, images_of(format), 3000, check, with_png_checksums if format == "PNG" else bytes)


def test_mutated_manifests_are_read_or_refused(bundle: Path, tmp_path: Path) -> None:
    file = bundle / MANIFEST_NAME
    whole = file.read_bytes()
    deep = json.dumps(json.loads(whole) | {"licenses": ["é\ud800", "x" * 300]}, indent=1).encode()

    def check(data: bytes) -> bool:
        file.write_bytes(data)
        for read in (read_manifest, lambda path: Bundle.open(path).manifest):
            try:
                manifest = read(bundle)
            except BundleError as error:
                assert "\n" not in str(error)
                continue
            assert isinstance(manifest, Manifest)
            assert len(manifest.digest()) == 64
        try:
            Manifest.model_validate_json(data)
        except ValidationError:
            return False
        return True

    fuzz(tmp_path, [whole, deep], 1500, check)


def is_good(bundle: Path) -> bool:
    try:
        Bundle.open(bundle)
    except BundleError as error:
        assert "\n" not in str(error)
        return False
    return True


Json = dict | list | str | int | float | bool | None
VALUES: list[Json] = [None, True, -1, 0, 10**400, 1e308, "", "../x", "a\0b", "x" * 10_000, [], {}, [[]], {"name": 1}]


def test_manifests_with_values_of_other_kinds_are_read_or_refused(bundle: Path, tmp_path: Path) -> None:
    file = bundle / MANIFEST_NAME
    whole = file.read_bytes()

    def places(node: Json) -> Iterator[tuple[dict | list, str | int]]:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):  # type: ignore[arg-type]
            yield node, key  # type: ignore[misc]
            if isinstance(value, (dict, list)):
                yield from places(value)

    count = len(list(places(json.loads(whole))))
    cases = [(place, value) for place in range(count) for value in VALUES]
    refused = 0
    with (tmp_path / "case").open("wb", buffering=0) as kept:
        for case, (place, value) in enumerate(cases):
            document = json.loads(whole)
            node, key = list(places(document))[place]
            node[key] = value  # type: ignore[index]
            data = json.dumps(document).encode()
            file.write_bytes(data)
            with reproducible(kept, case, data):
                refused += not is_good(bundle)
    assert 0 < refused < len(cases)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_mutated_rows_are_read_or_refused(tmp_path: Path, format: RowFormat) -> None:
    stamp = Stamp("tiny fp32", "0123456789ab")
    names = ["a.jpg", 'x "y", z', "two\nlines", "cr\r", os.fsdecode(b"caf\xe9"), "1", ""]
    results = [Result(name, i / 3, width=10 * i, height=7) for i, name in enumerate(names)]
    results += [Result(name, None, "unreadable", 'a "reason", of sorts') for name in names]
    whole = header(format) + b"".join(encode(format, result, stamp) for result in results)

    def check(data: bytes) -> bool:
        rows, end = 0, 0
        try:
            for row in read_rows(format, io.BytesIO(data)):
                assert end < row.end <= len(data)
                assert data[row.end - 1 : row.end] == b"\n"
                assert isinstance(row.result.path, str)
                assert row.result.score is None or isinstance(row.result.score, float)
                rows, end = rows + 1, row.end
        except MDNetError as error:
            assert "\n" not in str(error)
            return False
        # What a resumed run leaves: it is read to its end.
        again = list(read_rows(format, io.BytesIO(data[:end])))
        assert len(again) == rows
        return True

    fuzz(tmp_path, [whole], 10_000, check)


def archive_seeds(kind: str) -> list[bytes]:
    noise = random.Random(0).randbytes
    if kind == "parquet":
        return [
            parquet(**options) for options in ({}, {"compression": "zstd", "row_group_size": 3}, {"version": "1.0"})
        ]

    def tar(format: int) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
            for name in ("a.jpg", "long/" * 40 + "é.png", "notes.txt", "b.webp"):
                member = tarfile.TarInfo(name)
                member.size = 700
                archive.addfile(member, io.BytesIO(noise(700)))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "x/" * 60
            archive.addfile(link)
            hole = tarfile.TarInfo("hole.jpg")
            hole.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5000"}
            hole.size = 1024
            archive.addfile(hole, io.BytesIO(b"1\n4000\n512\n".ljust(512, b"\0") + noise(512)))
        return stream.getvalue()[:-8192]

    plain = [tar(format) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return plain if kind == "tar" else [gzip.compress(data) for data in plain]


def parquet(**options: object) -> bytes:
    stream = io.BytesIO()
    cells = [random.Random(i).randbytes(30 * i) for i in range(12)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": cell, "path": str(i)} if i % 5 else None for i, cell in enumerate(cells)], kind)
    pq.write_table(pa.table({"label": pa.array(range(12)), "image": image}), stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(("kind", "count"), [("tar", 15_000), ("tar.gz", 5000), ("parquet", 6000)])
def test_mutated_archives_give_entries_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, count: int
) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 2**20)
    name = "a.parquet" if kind == "parquet" else "a.tar"

    def check(data: bytes) -> bool:
        entries = []
        try:
            for entry in read_archive(name, lambda: io.BytesIO(data)):
                assert isinstance(entry, Entry)
                assert len(entries) < 10_000, "there is no end"
                entries.append(entry)
        except UsageError as error:  # a mutated schema has no such column
            assert kind == "parquet"
            assert "\n" not in str(error)
            return False
        for entry in entries[:-1]:
            assert entry.name.startswith(f"{name}::")
        for entry in entries:
            assert isinstance(entry.data, (bytes, ImageError))
            assert len(entry.data) <= 2**20 if isinstance(entry.data, bytes) else "\n" not in str(entry.data)
        return not (entries and entries[-1].name == name)

    fuzz(tmp_path, archive_seeds(kind), count, check, with_tar_checksums if kind == "tar" else bytes)
