"""The errors a user is meant to read: one line that says what was wrong, what was expected and what to do."""

from __future__ import annotations

import importlib.util
import os


class MDNetError(Exception):
    """Work that could not be done. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(MDNetError):
    """Something the user typed can't be right: a missing path, an unknown preset, options that contradict."""

    exit_code = 2


class BundleError(MDNetError):
    """A bundle that can't be trusted or read: bad manifest, wrong hash, missing file, path outside itself."""


class GpuLostError(MDNetError):
    """The GPU or its driver is gone for this process: everything on it fails until the process starts again."""


class MDNetWarning(UserWarning):
    """What a user should know although the work is done. The command line prints it as one line."""


def printable(text: str | os.PathLike[str]) -> str:
    r"""Text for a terminal: on one line, without control characters, bytes of a name that aren't UTF-8 as `\xff`."""
    return "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(text))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that was not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def first_line(error: BaseException) -> str:
    """What a foreign error says, as part of a one-line message of ours; its type where it says nothing."""
    return printable(next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__))


def require(module: str, extra: str) -> None:
    """Raise `MDNetError` naming the extra to install when `module` is not importable."""
    if importlib.util.find_spec(module) is None:
        raise MDNetError(f"{module} is not installed; it comes with the extra mdnet[{extra}]")
