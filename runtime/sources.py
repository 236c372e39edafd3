"""What the user named → the image files to score, in a fixed order."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mdnet_engines.errors import UsageError, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""What counts as an image when a folder is searched, in any case of letters."""

_MAGIC = re.compile(r"[*?[]")
_DIGITS = "0123456789"  # not str.isdigit(), which is true of "²"


def find_images(patterns: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Expand files, folders and glob patterns into the image files they mean.

    - A file is kept whatever its suffix; a broken link or a FIFO too, to become a row that says what is wrong.
    - A folder is searched with its subfolders for `SUFFIXES`. Linked files count (broken links too, so that a data
      set with files missing is not scored as if complete); linked folders are not entered, so there are no loops.
      FIFOs, sockets, devices and names that begin with a dot (macOS leaves `._face.jpg` beside `face.jpg`) are skipped.
    - A pattern (`*`, `?`, `[…]`, and `**` for any depth of folders) counts only where no such file exists; each match
      is then treated as if it had been named, as when the shell expands it.

    Returns:
        Paths in the order of the arguments, sorted within each with numbers by value (`img2` before `img10`). A file
        that several arguments reach is kept once, at its first place.

    Raises:
        UsageError: nothing is there, nothing matches, no image is in a folder, or a folder can't be read.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        images = _expand(pattern)
        if not images:
            raise UsageError(
                f"no images in {printable(pattern)} (looked for {' '.join(SUFFIXES)}, subfolders included)"
            )
        for path in images:
            found.setdefault(os.path.abspath(path), path)  # noqa: PTH100 (resolve() would merge linked names)
    return list(found.values())


def natural_key(path: os.PathLike[str]) -> tuple[object, ...]:
    """Sort key that compares runs of digits by value, folder by folder; the plain name decides between equals."""
    parts = tuple(
        tuple(
            (0, int(run), "") if run[0] in _DIGITS else (1, 0, run) for run in re.split(f"([{_DIGITS}]+)", part) if run
        )
        for part in Path(path).parts
    )
    return (parts, os.fspath(path))


def _expand(pattern: str | os.PathLike[str]) -> list[Path]:
    text = os.fspath(pattern)
    if not text:
        raise UsageError("an empty path was given (an unset shell variable?); give images, folders or a pattern")
    path = Path(text)
    if os.path.lexists(path):
        return _images_at(path)
    if not _MAGIC.search(text):
        raise UsageError(f"{printable(path)} does not exist; give images, folders or a quoted pattern")
    base, parts = (Path(path.anchor), path.parts[1:]) if path.anchor else (Path(), path.parts)
    matches = sorted(set(_matches(base, parts)), key=natural_key)
    if not matches:
        raise UsageError(f"no file matches {printable(path)}")
    return [image for match in matches for image in _images_at(match)]


def _images_at(path: Path) -> list[Path]:
    return sorted(_walk(path), key=natural_key) if path.is_dir() else [path]


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(root, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and _is_file_or_broken(path):
                yield path


def _is_file_or_broken(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
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
    elif _MAGIC.search(head):
        for entry in _listing(folder):
            hidden = entry.name.startswith(".") and not head.startswith(".")
            if not hidden and fnmatch.fnmatchcase(entry.name, head):
                yield from _matches(folder / entry.name, rest)
    elif os.path.lexists(folder / head):
        yield from _matches(folder / head, rest)


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    # To skip a folder in silence would score part of a data set as if it were the whole.
    where = printable(os.fsdecode(error.filename or ""))
    raise UsageError(f"can't read the folder {where}: {(error.strerror or str(error)).lower()}") from error
