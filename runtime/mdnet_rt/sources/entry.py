"""One image to score, and what names say: which are images, URLs and archives, and how they are ordered."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mdnet_rt.images.preprocess import ImageError

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".bmp", ".tif", ".tiff", ".gif", ".jp2", ".j2k", ".jpf", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm"),
)
"""Names of images that can be decoded, in any case of letters (HEIF with the extra `heif`)."""
FOUND_SUFFIXES = (
    *SUFFIXES,
    *(".dds", ".dib", ".exr", ".hdr", ".ico", ".jxl", ".psd", ".svg", ".tga"),
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"),  # cameras' raw files
)
"""What counts as an image when a folder or an archive is searched; the row of one that can't be decoded says so."""

_DIGITS = re.compile("[0-9]+")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")


@dataclass(frozen=True)
class Entry:
    """One image: what its row is called, and its file, its bytes, a function that fetches them, or what is wrong."""

    name: str
    data: Path | bytes | Callable[[], bytes] | ImageError


def is_url(location: str) -> bool:
    """Whether it is `scheme://…`."""
    return _URL.match(location) is not None


def archive_kind(location: str) -> Literal["tar", "parquet"] | None:
    """What kind of archive its name says it is; of a URL the path decides, whatever its query looks like."""
    name = (location.partition("?")[0] if is_url(location) else location).lower()
    if name.endswith(".parquet"):
        return "parquet"
    return "tar" if name.endswith((".tar", ".tar.gz", ".tgz")) else None


def natural_key(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Sort key: folder by folder, runs of digits by value, then the plain name (`02` before `2`).

    All of one folder comes before the next, as a folder is walked. The path as given decides between `a/b` and `a//b`.
    """
    return ("\0\0".join(key for part in Path(path).parts for key in (name_key(part), part)), os.fspath(path))


def name_key(name: str) -> str:
    """Sort key of one file or folder name, with runs of digits by value."""

    # One string, not a tuple of parts: there is one for each file of a folder. NUL is in no name and sorts first, so
    # that folders compare name by name and digits come before letters; a longer number is a larger one.
    def number(run: re.Match[str]) -> str:
        digits = run[0].lstrip("0")
        return f"\0{chr(len(digits) + 1)}{digits}"

    return _DIGITS.sub(number, name)
