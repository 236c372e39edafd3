"""One stage in a process of its own: `python -m gpu.worker`, started by `gpu.check`.

One JSON request comes on standard input. Rows go to a file, one a line and each as soon as it is known, so that those
of a process that dies or is killed stay. At the end a line `{"done": true}` says that it came to its end.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu.checkout import ROOT
from gpu.clock import Device
from gpu.context import Context, judge
from gpu.results import NOT_INSTALLED, Row, plain
from gpu.sizes import SIZES


def run(request: dict[str, Any], emit: Callable[[Row], None]) -> None:
    """Run the stage that `request` names."""
    missing = [module for module in request["needs"] if importlib.util.find_spec(module) is None]
    if missing:
        emit(Row("what it needs", NOT_INSTALLED, ", ".join(missing)))
        return
    deadline = time.monotonic() + request["seconds"]
    try:
        context = Context(
            device=Device(request["device"]),
            sizes=SIZES[request["sizes"]],
            scratch=Path(request["scratch"]),
            bundles=Path(request["bundles"]),
            deadline=deadline,
            emit=emit,
        )
        module, _, function = request["function"].partition(":")
        getattr(importlib.import_module(module), function)(context)
    except Exception as error:
        status, note, figures = judge(error)
        emit(Row("the stage itself", status, note, plain(figures)))


def _without(places: list[str], text: str) -> str:
    for place in places:
        text = text.replace(f"{place}/", "")
    return text


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    with Path(request["rows"]).open("a", encoding="utf-8") as file:

        def write(document: dict[str, Any]) -> None:
            print(json.dumps(document, allow_nan=False), file=file, flush=True)

        places = [request["scratch"], request["bundles"], str(ROOT), str(Path.home())]  # nobody else's concern
        run(request, lambda row: write(asdict(replace(row, note=_without(places, row.note)))))
        write({"done": True})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the work is done: a library that trips over its own unloading must not make it look undone


if __name__ == "__main__":
    main()
