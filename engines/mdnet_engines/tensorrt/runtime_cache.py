"""TensorRT-RTX's compiled kernels, kept in the user's cache for the next process.

TensorRT-RTX compiles a plan's kernels for the GPU when a batch size first runs. The file is that of one set of plans,
TensorRT-RTX's version, GPU and driver; it may be deleted at any time. A file that is damaged, or that TensorRT-RTX does
not take, is as good as none, and is replaced. Nothing in here ever fails a batch. *Unverified on a GPU.*
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mdnet_engines.errors import first_line
from mdnet_engines.system.atomic import new_file
from mdnet_engines.system.machine import cache_folder

_LOG = logging.getLogger("mdnet_engines")
_DIGEST = hashlib.sha256().digest_size  # in front of the kernels, so that native code reads none that are damaged


def cache_file(*known_by: str) -> Path | None:
    """Where the kernels that are known by all this lie; None where there is no folder for them."""
    folder = cache_folder("tensorrt-rtx")
    return folder and folder / f"{hashlib.sha256(json.dumps(known_by).encode()).hexdigest()[:32]}.kernels"


class RuntimeCache:
    """The kernels of one session's contexts. Close it after them; without a `file` it does nothing."""

    def __init__(self, file: Path | None):
        self._file = file
        self._lock = threading.Lock()
        self._cache: Any = None
        self._on_disk = b""

    def attach(self, config: Any) -> None:
        """Let the contexts made by `config` look here before they compile a kernel, and add those that they compile."""
        if self._file is None:
            return
        try:
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                self._read(self._file)
            if not config.set_runtime_cache(self._cache):
                raise RuntimeError("set_runtime_cache refused the cache")
        except Exception as error:  # native code, or a TensorRT-RTX without these calls
            self._give_up(error)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Around a batch that may compile kernels: other such batches wait, and then find them. Updates the file."""
        if self._file is None:
            yield
            return
        with self._lock:
            yield
            if self._file is not None and self._cache is not None:
                self._write(self._file)

    def close(self) -> None:
        """Drop the cache; the file stays."""
        self._cache, self._file = None, None

    def _read(self, file: Path) -> None:
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            _LOG.warning("%s can't be read (%s): TensorRT-RTX compiles its kernels anew", file, error.strerror)
            return
        digest, kernels = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(kernels).digest() != digest:
            _LOG.warning("%s is damaged: TensorRT-RTX compiles its kernels anew and replaces it", file)
        elif not self._cache.deserialize(kernels):
            _LOG.warning(
                "%s is of another GPU, driver or version: TensorRT-RTX compiles its kernels anew and replaces it", file
            )
        else:
            self._on_disk = digest

    def _write(self, file: Path) -> None:
        try:
            kernels = bytes(memoryview(self._cache.serialize()))
            digest = hashlib.sha256(kernels).digest()
            if digest == self._on_disk:
                return
            with new_file(file) as draft:
                draft.write_bytes(digest + kernels)
            self._on_disk = digest
        except Exception as error:  # a full disk, or native code
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        _LOG.warning("TensorRT-RTX's kernels are not kept for the next start (%s)", first_line(error))
        self._file = None
