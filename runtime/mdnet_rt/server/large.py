"""Large images are decoded in processes of their own, few at a time: they hold up nobody else, can be stopped, and the
memory they took goes back with the process.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mdnet_engines.errors import first_line
from mdnet_engines.system.child_process import Child, serve
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import Decoded, ImageError, decode

LARGE_PIXELS = 3_000_000
"""More are decoded here. Below, no decoder keeps other threads from running for more than 0.05 s."""
_JPEG2000_WEIGHT = 8  # its pixels count so often: its decoder keeps all other threads from running
_IDLE = 10.0  # seconds after which a process that has nothing to do ends


class LargeError(ImageError):
    """An image for `LargeDecoders` to decode, not for the thread that opened it."""


def refuse_large(image: Image.Image, pixels: int) -> None:
    """Raise `LargeError` for an image that takes long to decode; the `admit` of `decode`."""
    if pixels * (_JPEG2000_WEIGHT if image.format == "JPEG2000" else 1) > LARGE_PIXELS:
        raise LargeError("large")


@dataclass(frozen=True)
class Job:
    """An image file for `LargeDecoders`.

    Args:
        options: the keywords of `decode` other than the file, `size` among them; they become JSON.
        unwanted: whether nobody waits for it any more.
        deliver: called in a thread, once, with what became of it.
        face: the framing, as the manifest has it.
    """

    data: bytes
    options: dict[str, Any]
    unwanted: Callable[[], bool]
    deliver: Callable[[Decoded | ImageError], None]
    face: float | None = None


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
        child: Child | None = None
        found: Decoded | ImageError
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE if child else None)
            except queue.Empty:
                assert child is not None
                child.close()
                child = None
                continue
            if job is None:
                break
            if job.unwanted():
                job.deliver(ImageError("nobody waits for it"))
                continue
            try:
                child = child or Child(["-m", __name__], name="it")
                found = _decode_in(child, job, self._seconds)
            except Exception as error:  # no process could be started, or it died
                if child:
                    child.close()
                child = None
                found = ImageError(f"its decoder failed, or took longer than {self._seconds:g} s ({first_line(error)})")
            job.deliver(found)
        if child:
            child.close()


def _decode_in(child: Child, job: Job, seconds: float) -> Decoded | ImageError:
    """The image, or why there is none.

    Raises:
        MDNetError, OSError: the process has died, or was killed after `seconds`.
    """
    late = threading.Timer(seconds, child.kill)
    late.start()
    try:
        found = child.ask({"ask": "decode", "options": job.options, "face": job.face}, job.data)
    finally:
        late.cancel()
    if "error" in found:
        error = ImageError(found["error"])
        error.status = found["status"]
        return error
    size = job.options["size"]
    pixels = np.frombuffer(found.pop("data"), np.uint8).reshape(size, size, 3)
    return Decoded(pixels, **found)


def _decode(request: dict[str, Any], say: object) -> dict[str, Any]:
    """In the process: what became of an image."""
    try:
        found = decode(request.get("data", b""), find_box=face_finder(request["face"]), **request["options"])
    except ImageError as error:
        return {"error": str(error), "status": error.status}
    facts = {"width": found.width, "height": found.height, "warning": found.warning}
    return {**facts, "data": found.pixels.tobytes()}


if __name__ == "__main__":
    serve({"decode": _decode})
