"""TIFF files written from their specification (TIFF 6.0, sections 2 and 15), in layouts that no library here writes."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SHORT, _LONG = 3, 4


def tiff(
    pixels: np.ndarray,
    *,
    order: str = "<",
    photometric: int | None = None,
    sample_format: int = 1,
    bits: int | None = None,
    width: int | None = None,
    planar: bool = False,
    tile: int | None = None,
    deflate: bool = False,
    alpha: bool = False,
    preview: bool = False,
) -> bytes:
    """A file of one image.

    Args:
        pixels: `[H, W]` or `[H, W, C]`, of the type that is stored.
        order: `<` or `>`, as in `struct`.
        photometric: 0: grey, 0 is white; 1: grey; 2: RGB; 5: CMYK. Default: by the number of channels.
        sample_format: 1: unsigned, 2: signed, 3: floating-point.
        bits, width: where `pixels` are bytes of packed values: what is really in them.
        planar: all of one channel comes before the next.
        tile: side of square tiles; without it the image is one strip.
        alpha: whether the last channel is unassociated alpha.
        preview: whether it says that it is a smaller version of another image of the file.
    """
    height, stored = pixels.shape[:2]
    pixels = pixels.reshape(height, stored, -1)
    channels = pixels.shape[2]
    planes = np.split(pixels, channels, axis=2) if planar else [pixels]
    blocks = [block for plane in planes for block in (_tiles(plane, tile) if tile else [plane])]
    data = [block.astype(block.dtype.newbyteorder(order)).tobytes() for block in blocks]
    data = [zlib.compress(block) for block in data] if deflate else data
    sizes = [len(block) for block in data]
    offsets = [8 + sum(sizes[:i]) for i in range(len(sizes))]
    if photometric is None:
        photometric = 2 if channels >= 3 else 1
    tags: dict[int, tuple[int, list[int]]] = {
        254: (_LONG, [int(preview)]),
        256: (_LONG, [width or stored]),
        257: (_LONG, [height]),
        258: (_SHORT, [bits or 8 * pixels.dtype.itemsize] * channels),
        259: (_SHORT, [8 if deflate else 1]),
        262: (_SHORT, [photometric]),
        277: (_SHORT, [channels]),
        284: (_SHORT, [2 if planar else 1]),
        339: (_SHORT, [sample_format] * channels),
    }
    if alpha:
        tags[338] = (_SHORT, [2])
    if tile:
        tags |= {322: (_LONG, [tile]), 323: (_LONG, [tile]), 324: (_LONG, offsets), 325: (_LONG, sizes)}
    else:
        tags |= {273: (_LONG, offsets), 278: (_LONG, [height]), 279: (_LONG, sizes)}
    directory_at = 8 + sum(sizes)
    magic = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory_at)
    return magic + b"".join(data) + _directory(tags, order, directory_at)


def _tiles(plane: np.ndarray, side: int) -> list[np.ndarray]:
    height, width, channels = plane.shape
    tiles = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            part = plane[top : top + side, left : left + side]
            tiles.append(np.zeros((side, side, channels), plane.dtype))
            tiles[-1][: part.shape[0], : part.shape[1]] = part
    return tiles


def _directory(tags: dict[int, tuple[int, list[int]]], order: str, at: int) -> bytes:
    entries, beyond = struct.pack(f"{order}H", len(tags)), b""
    beyond_at = at + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
        if len(raw) > 4:
            raw, beyond = struct.pack(f"{order}I", beyond_at + len(beyond)), beyond + raw
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
    return entries + bytes(4) + beyond
