"""Images out of one file that holds many: tar archives (WebDataset shards among them) and Parquet files.

An archive is read once, from its beginning to its end, and nothing is unpacked to the disk: a member's name is only a
name, wherever it points. Each image is called `archive::member`, in Parquet `file::row`, rows counted from 0.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from mdnet_engines.errors import UsageError, first_line, require
from mdnet_rt.preprocess import ImageError
from mdnet_rt.sources import SUFFIXES, Entry

MAX_BYTES = 256 * 2**20
"""Larger members and cells are refused, since they are read into memory; so are larger files behind a URL."""


def read_archive(name: str, open_stream: Callable[[], BinaryIO], column: str | None = None) -> Iterator[Entry]:
    """The images of one archive. What is damaged ends it with an entry that says so, after all that is whole.

    Raises:
        UsageError: `column` names none of a Parquet file's columns that hold images.
        MDNetError: Parquet without pyarrow.
    """
    parquet = name.lower().endswith(".parquet")
    if parquet:
        require("pyarrow", "parquet")
    count = 0
    try:
        with open_stream() as stream:
            for entry in _rows(name, stream, column) if parquet else _members(name, stream):
                count += 1
                yield entry
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None
    except Exception as error:  # tarfile's, the decompressors', and those of each URL scheme's package
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else first_line(error)
        yield Entry(name, ImageError(f"{reason} (after {count} image{'' if count == 1 else 's'})"))


class _Member(tarfile.TarInfo):
    """A header that is cut or damaged raises; tarfile itself would take it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end, marked as it should be
            raise
        except tarfile.HeaderError as error:
            what = "no end mark, the archive may be cut" if "empty" in str(error) else f"damaged archive ({error})"
            raise tarfile.ReadError(what) from error


def _members(name: str, stream: BinaryIO) -> Iterator[Entry]:
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # it keeps each for getmembers(): memory that grows
            path = PurePosixPath(member.name)
            if member.isdir() or path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            yield Entry(f"{name}::{member.name}", _member_bytes(archive, member))


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ImageError:
    if not member.isreg():
        return ImageError("a link or a special file in an archive")
    if member.size > MAX_BYTES:
        return ImageError(too_large(member.size))
    stream = archive.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream.read()


def _rows(name: str, stream: BinaryIO, column: str | None) -> Iterator[Entry]:
    from mdnet_rt.parquet import read_images

    for row, cell in enumerate(read_images(stream, column)):
        data: bytes | ImageError
        if cell is None:
            data = ImageError("no image in this row")
        else:
            data = cell if len(cell) <= MAX_BYTES else ImageError(too_large(len(cell)))
        yield Entry(f"{name}::{row}", data)


def too_large(size: int) -> str:
    """Why a file of `size` bytes is refused."""
    return f"{size} bytes exceed the limit of {MAX_BYTES}"
