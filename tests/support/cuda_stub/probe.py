"""Launch scans in a process whose CUDA driver is the stub: python -m cuda_stub.probe '[{"context": …, …}, …]'

Each call has the sizes, `dtype`, `reverse` and `stream` of a scan, and optionally `context` and `refuse`. Tensor i of
`cuda_kernel.ARGUMENTS` is at address 4096 · (i + 1). Prints what the driver noted, and what each call said.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from cuda_stub import Driver
from mdnet_engines.cuda.kernel import ARGUMENTS
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import native


def launch(call: dict[str, Any], driver: Driver) -> str:
    driver.set_context(call.get("context", 1))
    driver.refuse(call.get("refuse", 0))
    at = {name: 4096 * (i + 1) for i, name in enumerate(ARGUMENTS)}
    sizes = (call[name] for name in ("batch", "channels", "length", "states"))
    rows = (native.Rows(at[name], 0, 0) for name in ("u", "delta", "z", "B", "C"))
    others = (at[name] for name in ("A", "D", "delta_bias", "y"))
    scan = native.Scan(*sizes, native.TYPES[call["dtype"]], call["reverse"], 0, *rows, *others)
    try:
        native.run_cuda(scan, call["stream"])
    except MDNetError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    driver = Driver()
    said = [launch(call, driver) for call in json.loads(sys.argv[1])]
    print(json.dumps({"said": said, "calls": driver.calls, "image": driver.image}))
