"""Images out of one file that holds many: tar archives (WebDataset shards among them) and Parquet files.

An archive is read once, from its beginning to its end, and nothing is unpacked to the disk: a member's name is only a
name, wherever it points. Each image is called `archive::member`, in Parquet `file::row`, rows counted from 0.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from mdnet_engines.errors import first_line, require
from mdnet_rt.images.decode import MAX_BYTES, ImageError, too_large
from mdnet_rt.sources.entry import FOUND_SUFFIXES, Entry, archive_kind

_MAX_HEADER = 2**20
"""Bytes of long names, pax headers and maps of holes between two members; tarfile reads them into memory too."""
_MAX_PADDING = 2**20
"""Bytes behind an end mark that are looked at; writers pad to 10 KiB, and a file may have a hole of any size."""


def read_archive(name: str, open_stream: Callable[[], BinaryIO], column: str | None = None) -> Iterator[Entry]:
    """The images of one archive. What is damaged ends it with an entry that says so, after all that is whole.

    Raises:
        MDNetError: Parquet without pyarrow.
    """
    parquet = archive_kind(name) == "parquet"
    if parquet:
        require("pyarrow", "parquet")
    count = 0
    try:
        with open_stream() as stream:
            for entry in _rows(name, stream, column) if parquet else _members(name, stream):
                count += 1
                yield entry
    except FileNotFoundError:  # that of a URL says only where
        yield Entry(name, ImageError("no such file"))
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
            raise tarfile.ReadError(f"damaged archive ({error})") from error


class _Raw(io.RawIOBase):
    """A stream that is not read again when it has ended; aiohttp complains of that on the terminal."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._ended = stream, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"" if self._ended else self._stream.read(len(buffer))
        self._ended = not data
        buffer[: len(data)] = data
        return len(data)


class _Source:
    """The bytes of an archive, without gzip; to end before the archive does is an error, and so is an endless header.

    Where a member declares more bytes than there are, tarfile itself would go on to read them for ever. Its own gzip
    ends in silence at the first of several parts, and checks no sum.
    """

    left = _MAX_HEADER
    """How many bytes may be read before the next member."""
    ended = False
    """Whether the end mark has been read."""

    def __init__(self, stream: BinaryIO):
        buffered = io.BufferedReader(_Raw(stream))
        packed = buffered.peek(2).startswith(b"\x1f\x8b")
        self._stream = gzip.GzipFile(fileobj=buffered) if packed else buffered

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.left -= len(data)
        if not data and not self.ended:
            raise tarfile.ReadError("no end mark, the archive may be cut")
        if self.left < 0 and not self.ended:
            raise tarfile.ReadError(f"damaged archive (a header of more than {_MAX_HEADER} bytes)")
        return data


def _members(name: str, stream: BinaryIO) -> Iterator[Entry]:
    source = _Source(stream)
    with tarfile.open(fileobj=source, mode="r|*", tarinfo=_Member) as archive:  # type: ignore[call-overload]
        for member in archive:
            archive.members.clear()  # it keeps each for getmembers(): memory that grows
            source.left = archive.offset - archive.fileobj.tell() + _MAX_HEADER
            path = PurePosixPath(member.name)
            if member.isdir() or path.suffix.lower() not in FOUND_SUFFIXES or path.name.startswith("."):
                continue
            yield Entry(f"{name}::{member.name}", _member_bytes(archive, member))
        # A header full of zeros, as a copy with holes has it, looks like the end too.
        source.ended = True
        if archive.fileobj.read(_MAX_PADDING).strip(b"\0"):
            raise tarfile.ReadError("more data behind an end mark, the archive may be damaged")


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | ImageError:
    if not member.isreg():
        return ImageError("a link or a special file in an archive")
    if member.size > MAX_BYTES:
        return ImageError(too_large(member.size, MAX_BYTES))
    stream = archive.extractfile(member)
    assert stream is not None  # it is a regular file
    return stream.read()


def _rows(name: str, stream: BinaryIO, column: str | None) -> Iterator[Entry]:
    from mdnet_rt.sources.parquet import read_images

    for row, cell in enumerate(read_images(stream, column)):
        data: bytes | ImageError
        if cell is None:
            data = ImageError("no image in this row")
        else:
            data = cell if len(cell) <= MAX_BYTES else ImageError(too_large(len(cell), MAX_BYTES))
        yield Entry(f"{name}::{row}", data)
