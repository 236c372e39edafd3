"""Large images are decoded in processes of their own, few at a time: they hold up nobody else, can be stopped, and the
memory they took goes back with the process.

A process reads jobs from its standard input, each a line of JSON and a file's bytes, and writes to its standard output
a line of JSON for each, followed by the pixels where there are any. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mdnet_engines.errors import first_line
from mdnet_rt.images.preprocess import Decoded, ImageError, decode

LARGE_PIXELS = 3_000_000
"""More are decoded here. Below, no decoder keeps other threads from running for more than 0.05 s."""
_JPEG2000_WEIGHT = 8  # its pixels count so often: its decoder keeps all other threads from running
_IDLE = 10.0  # seconds after which a process that has nothing to do ends


class LargeError(ImageError):
    """An image that is to be decoded by `LargeDecoders`, not where it was opened."""


def refuse_large(image: Image.Image, pixels: int) -> None:
    """Raise `LargeError` for an image that takes long to decode; the `admit` of `decode`."""
    if pixels * (_JPEG2000_WEIGHT if image.format == "JPEG2000" else 1) > LARGE_PIXELS:
        raise LargeError("large")


@dataclass(frozen=True)
class Job:
    """An image file for `LargeDecoders`.

    Args:
        options: the keywords of `decode` beside the file, `size` among them.
        unwanted: whether nobody waits for it any more.
        deliver: called in a thread, once, with what became of it.
    """

    data: bytes
    options: dict[str, Any]
    unwanted: Callable[[], bool]
    deliver: Callable[[Decoded | ImageError], None]


class LargeDecoders:
    """Threads that each keep a process busy.

    Args:
        count: how many images are decoded at a time.
        seconds: how long one may take before its process is killed.
    """

    def __init__(self, count: int, seconds: float):
        self._seconds = seconds
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="mdnet-large", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Queue an image. Called from any thread; never waits."""
        self._jobs.put(job)

    def close(self, *, wait: bool = True) -> None:
        """End threads and processes when they have done what was put before; `wait` for that."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self) -> None:
        child: _Child | None = None
        found: Decoded | ImageError
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE if child else None)
            except queue.Empty:
                assert child is not None
                child.end()
                child = None
                continue
            if job is None:
                break
            if job.unwanted():
                job.deliver(ImageError("nobody waits for it"))
                continue
            try:
                child = child or _Child()
                found = child.decode(job, self._seconds)
            except Exception as error:  # no process could be started, or it died
                if child:
                    child.end()
                child = None
                found = ImageError(f"its decoder failed ({first_line(error)})")
            job.deliver(found)
        if child:
            child.end()


class _Child:
    """A process that decodes."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", __name__]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # Not the current folder's modules: a folder called `numpy` may be there.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(command, env=environment, **pipes)  # type: ignore[call-overload]

    def decode(self, job: Job, seconds: float) -> Decoded | ImageError:
        """The image, or why there is none.

        Raises:
            OSError, ValueError: the process has died.
        """
        late = threading.Timer(seconds, self._process.kill)
        late.start()
        try:
            _write(self._process.stdin, {**job.options, "bytes": len(job.data)}, job.data)
            answer = json.loads(self._process.stdout.readline() or "null")
            if answer is None:
                raise ChildProcessError(f"ended, or took longer than {seconds:g} s")
            if "error" in answer:
                return ImageError(answer["error"])
            size = job.options["size"]
            pixels = np.frombuffer(self._process.stdout.read(size * size * 3), np.uint8).reshape(size, size, 3)
            return Decoded(pixels, answer["width"], answer["height"], answer["warning"])
        finally:
            late.cancel()

    def end(self) -> None:
        """Let it end, and wait for that."""
        with contextlib.suppress(OSError), self._process:
            self._process.kill()


def main() -> None:
    """The process: decode what comes, until nothing more does."""
    # What a library prints to standard output must not get among the answers.
    answers, jobs = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    while line := jobs.readline():
        options = json.loads(line)
        data = jobs.read(options.pop("bytes"))
        try:
            found = decode(data, options.pop("size"), **options)
        except ImageError as error:
            _write(answers, {"error": str(error)})
        else:
            facts = {"width": found.width, "height": found.height, "warning": found.warning}
            _write(answers, facts, found.pixels.tobytes())


def _write(stream: BinaryIO, head: dict[str, Any], body: bytes = b"") -> None:
    stream.write(json.dumps(head).encode() + b"\n")
    stream.write(body)
    stream.flush()


if __name__ == "__main__":
    main()
