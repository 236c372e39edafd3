"""PNG without the metadata that Pillow gives up the pixels for: texts and profiles that are large, damaged or bombs."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_METADATA = 2**20
"""Bytes, unpacked, of one profile and of all texts together that are kept; Pillow refuses files with more."""
MAX_CHUNKS = 100_000
"""A file has no more parts than that; each takes its time, however small it is."""
_HEADER = struct.Struct(">I4s")  # length, kind; the body follows, and a checksum of four bytes
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")  # the first picture stands apart from them
_SIZES = {b"cHRM": 32, b"gAMA": 4, b"pHYs": 9, b"sRGB": 1}


def without_baggage(stream: BinaryIO) -> tuple[BinaryIO, bool]:
    """The stream itself, or, where metadata would cost the pixels, a copy in memory without it.

    Returns:
        What to read, and whether a colour profile was left out.

    Raises:
        ValueError: more than `MAX_CHUNKS` parts.
    """
    left_out = _baggage(stream)
    stream.seek(0)
    if not left_out:
        return stream, False
    data, at, kept = memoryview(stream.read()), 0, []
    for start, end, _ in left_out:
        kept.append(data[at:start])
        at = end
    return io.BytesIO(b"".join([*kept, data[at:]])), any(kind == b"iCCP" for *_, kind in left_out)


def _baggage(stream: BinaryIO) -> list[tuple[int, int, bytes]]:
    """Beginning, end and kind of each part to leave out."""
    found: list[tuple[int, int, bytes]] = []
    texts, at = 0, len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        stream.seek(at)
        header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return found
        length, kind = _HEADER.unpack(header)
        end = at + _HEADER.size + length + 4
        if not kind.isalpha() or kind == b"IEND":
            return found
        if kind[:1].islower() and kind != b"tRNS":  # metadata, by the letter's case
            size = _unpacked_size(stream, kind, length)
            texts += size if kind in _TEXTS else 0
            if size > MAX_METADATA or (kind in _TEXTS and texts > MAX_METADATA):
                found.append((at, end, kind))
        at = end
    raise ValueError(f"a PNG of more than {MAX_CHUNKS} chunks")


def _unpacked_size(stream: BinaryIO, kind: bytes, length: int) -> int:
    """Bytes that a chunk's body unpacks to; more than `MAX_METADATA` also if it can't be used."""
    if length > MAX_METADATA or kind in _ANIMATION or length != _SIZES.get(kind, length):
        return MAX_METADATA + 1
    body, checksum = stream.read(length), stream.read(4)
    if checksum != zlib.crc32(body, zlib.crc32(kind)).to_bytes(4, "big"):
        return MAX_METADATA + 1
    try:
        packed = _packed_part(kind, body)
        return length if packed is None else len(zlib.decompressobj().decompress(packed, MAX_METADATA + 1))
    except zlib.error:
        return MAX_METADATA + 1


def _packed_part(kind: bytes, body: bytes) -> bytes | None:
    """What is deflated in a profile or a text; None where nothing is."""
    _, _, rest = body.partition(b"\0")  # behind the keyword
    if kind in (b"iCCP", b"zTXt"):
        if rest[:1] != b"\0":
            raise zlib.error("unknown method")
        return rest[1:]
    if kind == b"iTXt" and rest[:1] == b"\1":
        return rest[2:].split(b"\0", 2)[-1]  # behind the language, and the keyword in it
    return None
