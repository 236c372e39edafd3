"""One stage in a process of its own: `python -m gpu.worker`, started by `gpu.check`.

One JSON request comes on standard input. Everything goes to the stage's journal (`gpu.journal`) as soon as it is known,
so that the rows of a process that dies or is killed stay.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gpu.checkout import ROOT
from gpu.clock import Device
from gpu.context import Context, judge
from gpu.journal import Writer
from gpu.results import NOT_INSTALLED, Row, plain
from gpu.sizes import SIZES

_PR_SET_PDEATHSIG = 1  # of prctl(2)


def run(request: dict[str, Any], report: Writer) -> bool:
    """Run the stage that `request` names; False where an exception ended it."""
    missing = [module for module in request["needs"] if importlib.util.find_spec(module) is None]
    if missing:
        report.row(Row("what it needs", NOT_INSTALLED, ", ".join(missing)))
        return True
    try:
        context = Context(
            device=Device(request["device"]),
            sizes=SIZES[request["sizes"]],
            scratch=Path(request["scratch"]),
            bundles=Path(request["bundles"]),
            deadline=time.monotonic() + request["seconds"],
            report=report,
        )
        module, _, function = request["function"].partition(":")
        getattr(importlib.import_module(module), function)(context, *request["arguments"])
    except Exception as error:
        status, note, figures = judge(error)
        report.row(Row("the stage itself", status, note, plain(figures)))
        return False
    return True


def main() -> None:
    """Answer the request on standard input."""
    if sys.platform == "linux":  # whatever ends the script ends the stage, which would go on using the GPU
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    places = [request["scratch"], request["bundles"], str(ROOT), str(Path.home())]  # nobody else's concern
    with Path(request["journal"]).open("a", encoding="utf-8") as file:
        writer = Writer(file, places)
        writer.done(whole=run(request, writer))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the work is done: a library that trips over its own unloading must not make it look undone


if __name__ == "__main__":
    main()
