"""Files and folders that appear whole or not at all: written beside their place, put there in one step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def new_file(target: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """Give a path beside `target` to write to; the file takes the place of `target` if the block ends well.

    If the block raises or the process dies, `target` is as it was.

    Args:
        scratch: the path to write to; by default a new one, so that several processes may write one file.

    Raises:
        OSError: it can't be written, or the disk is full.
    """
    if scratch is None:  # not of the target's name, which may be as long as names can be
        scratch = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield scratch
        flush_to_disk(scratch)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, check_free: Callable[[], None]) -> Iterator[Path]:
    """Give an empty folder beside `target` to fill; it takes the place of `target` if the block ends well.

    If the block raises or the process dies, `target` is as it was.

    Args:
        check_free: called before and after the block; raises where `target` may not be replaced.

    Raises:
        OSError: it can't be written, or the disk is full.
    """
    check_free()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    folder = scratch / target.name
    try:
        folder.mkdir()
        yield folder
        settle(folder)
        check_free()
        if target.exists():
            exchange(folder, target)
        else:
            folder.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # with the old folder, after an exchange


def settle(folder: Path) -> None:
    """Make a scratch folder ready for its place: permissions as the umask has them, every file on the disk."""
    mask = _umask()
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)  # onnx makes files of weights that only their owner can read
            flush_to_disk(path)


def flush_to_disk(file: Path) -> None:
    """Wait until a file's bytes are on the disk; a full one may say so only then."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def exchange(new: Path, old: Path) -> None:
    """Swap two folders. On Linux in one system call, so that no reader ever finds `old` missing."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 and renameat2(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), rename_exchange) == 0:
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{old.name}.old.", dir=old.parent))
    kept = aside / old.name
    try:
        old.rename(kept)
        new.rename(old)
        kept.rename(new)
    except BaseException:
        if not old.exists():
            kept.rename(old)
        raise
    finally:
        with contextlib.suppress(OSError):  # not empty: the old folder could not be put back, and stays there
            aside.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
