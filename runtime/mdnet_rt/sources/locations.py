"""What the user named → the images to score, one after the other, in a fixed order.

A *location* is a path or a URL. Most are one image each; a tar archive and a Parquet file hold many (`archives.py`).
Folders and patterns are walked while images are scored, so that a million names are never held at once.
"""

from __future__ import annotations

import codecs
import fnmatch
import functools
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from mdnet_engines.errors import MDNetError, UsageError, printable
from mdnet_rt.sources.archives import read_archive
from mdnet_rt.sources.entry import FOUND_SUFFIXES, SUFFIXES, Entry, archive_kind, is_url, name_key, natural_key
from mdnet_rt.sources.remote import expand_url, read_url

_MAGIC = re.compile(r"[*?[]")


def read_locations(locations: Iterable[str], *, column: str | None = None) -> Iterator[Entry]:
    """The images at each location, in order. What can't be opened becomes an entry with the reason.

    Args:
        column: of Parquet files, which holds the images.
    """
    for location in locations:
        if is_url(location):
            yield from read_url(location, column)
        elif archive_kind(location) and not _is_folder(location):
            yield from read_archive(location, functools.partial(_open_file, location), column)
        else:
            yield Entry(location, Path(location))


def find_images(patterns: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """As `find_locations`, at once, for those who need to choose among all of them."""
    return [Path(location) for location in find_locations(patterns)]


def find_locations(patterns: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Expand files, folders, glob patterns and URLs into the locations they mean.

    - A file is kept whatever its suffix; a broken link or a FIFO too, to become a row that says what is wrong.
    - A folder is searched with its subfolders for `FOUND_SUFFIXES`. Linked files count (broken links too, so that a
      data set with files missing is not scored as if complete); linked folders are not entered, so there are no loops.
      FIFOs, sockets, devices and names that begin with a dot (macOS adds `._face.jpg` to `face.jpg`) are skipped.
    - A pattern (`*`, `?`, `[…]`, and `**` for any depth of folders) counts only where no such file exists; each match
      is then treated as if it had been named, as when the shell expands it.
    - A URL is expanded likewise by `mdnet_rt.sources.remote`.

    Every pattern is checked before the first location is yielded: a mistake in the last one is reported at once.

    Returns:
        Locations in the order of the arguments, sorted within each with numbers by value (`img2` before `img10`). A
        file that several arguments reach is kept once, at its first place.

    Raises:
        UsageError: nothing exists there, nothing matches, no image is in a folder, or a folder can't be read (which is
            found out only when the walk comes to it).
    """
    expanded = [_expand(pattern) for pattern in patterns]
    for pattern, locations in zip(patterns, expanded, strict=True):
        if next(locations(), None) is None:
            raise UsageError(
                f"no images in {printable(pattern)} (looked for {' '.join(SUFFIXES)}, subfolders included)"
            )
    if len(expanded) == 1:
        return expanded[0]()
    return _once(location for locations in expanded for location in locations())


def is_pattern(location: str) -> bool:
    """Whether it has one of the characters that make a pattern; a file of that name may exist all the same."""
    return _MAGIC.search(location) is not None


def read_list(stream: BinaryIO, *, null: bool = False) -> Iterator[str]:
    """The locations in a text file, one a line; `null`: each ended by a NUL byte, as `find -print0` has them.

    Nothing is expanded and nothing left out but empty lines: what is not there becomes a row. Bytes are taken as the
    file system's, behind a byte-order mark of UTF-8.

    Raises:
        UsageError: it begins with a byte-order mark of UTF-16.
    """
    for number, line in enumerate(_split(stream) if null else stream):
        name = line if null else line.rstrip(b"\r\n")
        if number == 0:
            if name.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UsageError("the list is in UTF-16; save it as UTF-8")
            name = name.removeprefix(codecs.BOM_UTF8)
        if name:
            yield os.fsdecode(name)


def _once(locations: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for location in locations:
        key = location if is_url(location) else os.path.abspath(location)  # noqa: PTH100 (resolve() would merge links)
        if key not in seen:
            seen.add(key)
            yield location


def _expand(pattern: str | os.PathLike[str]) -> Callable[[], Iterator[str]]:
    """A function that gives what a pattern means, as often as it is called."""
    text = os.fspath(pattern)
    if not text:
        raise UsageError("an empty path was given (an unset shell variable?); give images, folders or a pattern")
    if is_url(text):
        return expand_url(text)
    path = Path(text)
    if os.path.lexists(path):
        return lambda: _images_at(path)
    if not is_pattern(text):
        raise UsageError(f"{printable(path)} does not exist; give images, folders or a quoted pattern")
    base, parts = (Path(path.anchor), path.parts[1:]) if path.anchor else (Path(), path.parts)
    matches = sorted({os.fspath(match) for match in _matches(base, parts)}, key=natural_key)
    if not matches:
        raise UsageError(f"no file matches {printable(path)}")
    return lambda: _once(image for match in matches for image in _images_at(Path(match)))


def _images_at(path: Path) -> Iterator[str]:
    return _walk(path) if _is_folder(path) else iter([os.fspath(path)])


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 (Path.is_dir() raises where a name is too long or a folder is closed)


def _walk(folder: Path) -> Iterator[str]:
    files: list[str] = []
    folders: set[str] = set()
    for entry in _listing(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            folders.add(entry.name)
        elif entry.name.lower().endswith(FOUND_SUFFIXES) and _is_file_or_broken(entry):
            files.append(entry.name)
    names = sorted([*files, *folders])
    del files
    names.sort(key=name_key)
    for name in names:
        if name in folders:
            yield from _walk(folder / name)
        else:
            yield os.path.join(folder, name) if folder != Path() else name  # noqa: PTH118 (ten times faster)


def _is_file_or_broken(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_file()  # without asking the file system again
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return True


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Paths under `folder` that match the pattern's components. Not `glob`: its `**` follows links into loops."""
    if not parts:
        yield folder
        return
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _matches(folder, rest)
        for entry in _listing(folder):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _matches(folder / entry.name, parts)
    elif is_pattern(head):
        for entry in _listing(folder):
            hidden = entry.name.startswith(".") and not head.startswith(".")
            if not hidden and fnmatch.fnmatchcase(entry.name, head):
                yield from _matches(folder / entry.name, rest)
    elif os.path.lexists(folder / head):
        yield from _matches(folder / head, rest)


def _listing(folder: Path) -> Iterator[os.DirEntry[str]]:
    if not folder.is_dir():
        return
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    # To skip a folder in silence would score part of a data set as if it were the whole.
    where = printable(os.fsdecode(error.filename or ""))
    raise UsageError(f"can't read the folder {where}: {(error.strerror or str(error)).lower()}") from error


def _open_file(location: str) -> BinaryIO:
    path = Path(location)
    if path.exists() and not path.is_file():
        raise MDNetError("not a regular file")  # to open a FIFO would wait for a writer for ever
    return path.open("rb")


def _split(stream: BinaryIO) -> Iterator[bytes]:
    """Names that end in NUL bytes; the last may lack its own."""
    rest = b""
    while chunk := stream.read1(2**16) if hasattr(stream, "read1") else stream.read(2**16):
        *names, rest = (rest + chunk).split(b"\0")
        yield from names
    if rest:
        yield rest
