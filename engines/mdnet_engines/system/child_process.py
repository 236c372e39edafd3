"""Ask a process of its own: whatever native code does in there, it ends in one line here.

One JSON request goes to the child's standard input; the answer is one JSON object a line on its standard output:

    {"step": "encoder: optimizing graph, 40 %"}     what it is doing
    {"note": "…"}                                   what the user should know
    {"error": "…", "kind": "usage", "errno": […]}   why it failed; an `OSError`'s arguments where it was one
    {"result": …}                                   the last line of work that was done
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
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mdnet_engines.errors import MDNetError, UsageError, first_line, printable
from mdnet_engines.progress import SILENT, Progress

Tell = Callable[[str], None]
Say = Callable[[str, Any], None]  # (key, value) of one line of the answer
Handler = Callable[[dict[str, Any], Say], Any]


class CrashError(MDNetError):
    """The child ended without an answer: native code crashed, or memory ran out."""


def ask(
    module: str,
    request: Mapping[str, Any],
    *,
    name: str,
    progress: Progress = SILENT,
) -> Any:
    """Run `python -m module`, which calls `serve`, on one request; give its result.

    Args:
        request: what JSON can hold; its `ask` names the handler.
        name: what messages call the process: `TensorRT`.

    Raises:
        CrashError: the process ended without an answer; says how, and during which step.
        MDNetError, UsageError, OSError: what the handler raised.
    """
    # Not the current folder's modules: a folder called `tensorrt` may be there.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    last = ""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            encoding="utf-8",
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "step" in answer:
                    progress.step(last := answer["step"])
                elif "note" in answer:
                    progress.note(answer["note"])
                elif "error" in answer:
                    raise _as_raised(answer)
                else:
                    return answer["result"]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)  # its answers ended, and how it ends is about to show
        except BrokenPipeError:
            pass  # it ended before it read the request
        finally:
            process.kill()
        errors.seek(0)
        tail = errors.read().decode(errors="replace").strip().splitlines()
    said = f", having said: {printable(tail[-1])[:200]}" if tail else ""
    during = f" during {last}" if last else ""
    raise CrashError(f"{name}'s process {_end(process.wait())}{during}{said}")


def serve(handlers: Mapping[str, Handler]) -> NoReturn:
    """Be the child: answer the request on standard input with the handler that it asks for, and end the process."""
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # native code would not look at Python's flag for minutes
    warnings.simplefilter("ignore")
    # Native code that prints must not write between the lines of the answer.
    answer = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(key: str, value: Any, **more: Any) -> None:
        try:
            print(json.dumps({key: value, **more}), file=answer, flush=True)
        except BrokenPipeError:  # who asked is gone
            os._exit(1)

    request, code = json.load(sys.stdin), 1
    try:
        result = handlers[request["ask"]](request, say)
    except MDNetError as error:
        say("error", str(error), kind="usage" if isinstance(error, UsageError) else "work")
    except OSError as error:
        say("error", str(error), errno=[error.errno, error.strerror, error.filename])
    except Exception as error:
        say("error", f"unexpected {type(error).__name__}: {first_line(error)}")
    else:
        say("result", result)
        code = 0
    sys.stderr.flush()
    os._exit(code)  # the work is done: a library that trips over its own unloading must not make it look undone


def end_with(parent: int) -> None:
    """End this process soon after its parent, who alone wants the answer."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
