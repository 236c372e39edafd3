"""Launch scans in a process whose CUDA driver is the stub: python -m cuda_stub.probe '[{"context": …, …}, …]'

Each call has the sizes, `dtype`, `reverse` and `stream` of a scan, and optionally `context` and `refuse`, and what
version 2 adds: `groups`, `without` (names of tensors), `softplus` and `state`. Tensor i of `TENSORS` is at address
4096 · (i + 1). Prints what the driver noted, and what each call said.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cuda_stub import Driver
from mdnet_engines.cuda.kernel import ARGUMENTS
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native

TENSORS = (*ARGUMENTS, "h0", "h_last")


def launch(call: dict[str, Any], driver: Driver) -> str:
    driver.set_context(call.get("context", 1))
    driver.refuse(call.get("refuse", 0))
    missing = {*call.get("without", ()), *(() if call.get("state") else ("h0", "h_last"))}
    at = {name: None if name in missing else 4096 * (i + 1) for i, name in enumerate(TENSORS)}
    sizes = (call[name] for name in ("batch", "channels", "length", "states"))
    rows = (native.Rows(at[name], 0, 0) for name in ("u", "delta", "z", "B", "C"))
    others = (at[name] for name in ("A", "D", "delta_bias", "y"))
    added = (call.get("groups", 0), not call.get("softplus", True), at["h0"], at["h_last"])
    scan = native.Scan(*sizes, native.TYPES[call["dtype"]], call["reverse"], 0, *rows, *others, *added)
    try:
        native.run_cuda(scan, call["stream"])
    except MDNetError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    driver = Driver()
    said = [launch(call, driver) for call in json.loads(sys.argv[1])]
    print(json.dumps({"said": said, "calls": driver.calls, "image": driver.image}))
