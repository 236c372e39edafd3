"""Where an output path leads: to a file that is replaced when the new one is whole, or to what is written through."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from mdnet_engines.errors import UsageError, printable

_DESCRIPTOR = re.compile(r"/proc/(?P<process>[0-9]+)(?:/task/[0-9]+)?/fd/(?P<number>[0-9]+)|/dev/fd/(?P<ours>[0-9]+)")
_MAX_LINKS = 40  # as many as Linux follows


def descriptor_of(path: str | os.PathLike[str]) -> int | None:
    """The number of this process's open file that a path names, as `/dev/stdout` and `/proc/self/fd/3` do, or links to
    them; else None.
    """
    named = _named_descriptor(path)
    if named is None or named["process"] not in (None, str(os.getpid())):
        return None
    return int(named["number"] or named["ours"])


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a path leads to an open file, a device, a FIFO or a socket: what a rename must not take the place of."""
    if _named_descriptor(path) is not None:
        return True
    try:
        return not stat.S_ISREG(Path(path).stat().st_mode)
    except OSError:
        return False


def open_special(path: str | os.PathLike[str]) -> BinaryIO:
    """Open what `is_special` for writing, where its own position is: nothing that is in it is lost.

    Raises:
        OSError: there is no such open file, or it may not be written to.
    """
    descriptor = descriptor_of(path)
    # Not by its name: that would open the file again, at its beginning, and a socket has no name.
    return Path(path).open("ab") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def check_writable(target: Path, name: str) -> None:
    """Raise `UsageError` where no new file could take `target`'s place, links followed; messages call it `name`."""
    if target.is_dir():
        raise UsageError(f"{name} is a folder; give the file to write")
    if not target.parent.is_dir():
        raise UsageError(f"{name}: the folder {printable(target.parent)} does not exist; create it first")
    # Replacing takes a writable folder only, but a read-only file was made so for a reason.
    for place in [target.parent, *([target] if target.exists() else [])]:
        if not os.access(place, os.W_OK):
            raise UsageError(f"{name}: no permission to write to {printable(place)}")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 to a file, or through to what `is_special`."""
    with open_special(path) if is_special(path) else path.open("wb") as stream:
        stream.write(text.encode())


def _named_descriptor(path: str | os.PathLike[str]) -> re.Match[str] | None:
    """Follow links one by one: the last step, from an open file's name to the file, is not to be taken."""
    place = os.fspath(path)
    for _ in range(_MAX_LINKS):
        folder, name = os.path.split(place)
        folder = os.path.realpath(folder)
        place = os.path.join(folder, name)  # noqa: PTH118 (Path would drop a `..` without following links)
        if named := _DESCRIPTOR.fullmatch(place):
            return named
        if not os.path.islink(place):  # noqa: PTH114
            return None
        place = os.path.join(folder, os.readlink(place))  # noqa: PTH115, PTH118
    return None
