"""PNG files written from their specification (ISO/IEC 15948), for what Pillow doesn't write: 16 bits, any chunk."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of channels


def chunk(kind: bytes, body: bytes, checksum: bytes | None = None) -> bytes:
    right = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + (right if checksum is None else checksum)


def png(pixels: np.ndarray, *chunks: bytes) -> bytes:
    """A file of `pixels`, uint8 or uint16, `[H, W]` or `[H, W, C]`, with more chunks before them."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    kind = _COLOUR_TYPES[pixels.shape[2] if pixels.ndim == 3 else 1]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def transparent(*colour: int) -> bytes:
    """The chunk that makes one colour of a grey or an RGB picture transparent."""
    return chunk(b"tRNS", struct.pack(f">{len(colour)}H", *colour))


def profile(icc: bytes) -> bytes:
    return chunk(b"iCCP", b"icc\0\0" + zlib.compress(icc))
