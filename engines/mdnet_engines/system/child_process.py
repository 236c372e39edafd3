"""Ask a process of its own: whatever native code does in there, it ends in one line here.

A JSON request a line goes to the child's standard input; the answer to each is one JSON object a line on its standard
output:

    {"step": "encoder: optimizing graph, 40 %"}     what it is doing
    {"note": "…"}                                   what the user should know
    {"error": "…", "kind": "usage", "errno": […]}   why it failed, and ends; an `OSError`'s arguments where it was one
    {"result": …}                                   the last line of work that was done

Bytes follow a line where its `bytes` says how many; they are the `data` of a request, or of a result.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, NoReturn, TypeVar

from mdnet_engines.errors import MDNetError, UsageError, first_line, printable
from mdnet_engines.progress import SILENT, Progress

C = TypeVar("C", bound="Child")
Tell = Callable[[str], None]
Say = Callable[[str, Any], None]  # (key, value) of one line of the answer
Handler = Callable[[dict[str, Any], Say], Any]


class CrashError(MDNetError):
    """The child ended without an answer: native code crashed, or memory ran out."""


class Child:
    """A process that calls `serve`; it starts at once. Use it in a `with` block, which ends it.

    Args:
        program: what Python runs, with its arguments: `-m` and a module, or a file.
        name: what messages call it: `TensorRT`.
        environment: of its own, beside this process's.
    """

    def __init__(self, program: Sequence[str], *, name: str, environment: Mapping[str, str] | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, *program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Not the current folder's modules: a folder called `tensorrt` may be there.
            env={**os.environ, **(environment or {}), "PYTHONSAFEPATH": "1"},
        )
        self.pid = self._process.pid

    def ask(
        self,
        request: Mapping[str, Any],
        data: bytes = b"",
        *,
        progress: Progress = SILENT,
    ) -> Any:
        """Give the result of one request.

        Args:
            request: what JSON can hold; its `ask` names the handler.
            data: what the handler gets as the request's `data`.

        Raises:
            CrashError: the process ended without an answer; says how, and during which step.
            MDNetError, UsageError, OSError: what the handler raised.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last = ""
        with contextlib.suppress(BrokenPipeError):  # it ended before it read the request
            _write(self._process.stdin, request, data)
        for line in self._process.stdout:
            answer = json.loads(line)
            if "step" in answer:
                progress.step(last := answer["step"])
            elif "note" in answer:
                progress.note(answer["note"])
            elif "error" in answer:
                raise _as_raised(answer)
            else:
                if size := answer["bytes"]:
                    answer["result"]["data"] = self._process.stdout.read(size)
                return answer["result"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # its answers ended, and how it ends is about to show
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        tail = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f", having said: {printable(tail[-1])[:400]}" if tail else ""
        during = f" during {last}" if last else ""
        raise CrashError(f"{self.name}'s process {_end(code)}{during}{said}")

    def kill(self) -> None:
        """End the process, whatever it is doing; who asks it gets a `CrashError`. For another thread."""
        self._process.kill()

    def close(self) -> None:
        """End the process, and wait for that."""
        self.kill()
        self._process.wait()
        self._errors.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a line that was never taken
                pipe.close()

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask(
    module: str,
    request: Mapping[str, Any],
    *,
    name: str,
    progress: Progress = SILENT,
) -> Any:
    """Run `python -m module` for one request; as `Child.ask`."""
    with Child(["-m", module], name=name) as child:
        return child.ask(request, progress=progress)


def serve(handlers: Mapping[str, Handler]) -> NoReturn:
    """Be the child: answer each request on standard input with the handler that it asks for, and end the process.

    A handler takes a request and a function that says a step or a note. `data` in its result, a dict then, is bytes.
    """
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # native code would not look at Python's flag for minutes
    warnings.simplefilter("ignore")
    # Native code that prints must not write between the lines of the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(key: str, value: Any, data: bytes = b"", **more: Any) -> None:
        try:
            _write(answer, {key: value, **more}, data)
        except BrokenPipeError:  # the caller has ended
            os._exit(1)

    code = 1
    try:
        for line in sys.stdin.buffer:
            request = json.loads(line)
            if size := request.pop("bytes", 0):
                request["data"] = sys.stdin.buffer.read(size)
            result = handlers[request["ask"]](request, say)
            say("result", result, result.pop("data", b"") if isinstance(result, dict) else b"")
        code = 0
    except MDNetError as error:
        say("error", str(error), kind="usage" if isinstance(error, UsageError) else "work")
    except OSError as error:
        say("error", str(error), errno=[error.errno, error.strerror, error.filename])
    except Exception as error:
        say("error", f"unexpected {type(error).__name__}: {first_line(error)}")
    sys.stderr.flush()
    os._exit(code)  # the work is done: a library that trips over its own unloading must not make it look undone


def end_with(parent: int) -> None:
    """End this process soon after its parent, who alone wants the answer."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(stream: IO[bytes], line: Mapping[str, Any], data: bytes) -> None:
    stream.write(json.dumps({**line, "bytes": len(data)}).encode() + b"\n")
    stream.write(data)
    stream.flush()


def _as_raised(answer: Mapping[str, Any]) -> Exception:
    if "errno" in answer:
        return OSError(*answer["errno"])
    return (UsageError if answer.get("kind") == "usage" else MDNetError)(answer["error"])


def _end(code: int) -> str:
    if code >= 0:
        return f"ended without an answer (exit code {code})"
    if code == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by {signal.Signals(-code).name}"
