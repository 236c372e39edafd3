"""Parts of the committed PTX: one kernel of it, and one with some of its arguments fixed.

    ptx_of("selective_scan2_forward_f16_n16", {"z": 0, "softplus": 1})

TensorRT's ahead-of-time plugins hand a kernel their inputs, numbers and outputs, and so never a null pointer: what an
operator lacks must be no argument of its kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mdnet_engines.cuda.kernel import ARGUMENTS_V2, ptx

_ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)\)(.*?^\}\n)", re.DOTALL | re.MULTILINE)
_REMARK = re.compile(r"^(?:\t// \.globl\b|// \w+ has been demoted).*\n", re.MULTILINE)  # NVRTC's, on every kernel
_PARAMETER = re.compile(r"\.param \.\w+ (\w+)")
_LOAD = re.compile(r"ld\.param\.(u32|u64)(\s+%\w+), \[(\w+)\];")


def ptx_of(kernel: str, fixed: Mapping[str, int] | None = None) -> str:
    """The PTX of one kernel alone: every node of a network takes its own copy into the engine, which compiles it.

    Args:
        fixed: arguments of a kernel of version 2 that are these numbers, and no longer parameters; the others keep
            their order.
    """
    alone = _REMARK.sub("", _ENTRY.sub(lambda entry: entry[0] if entry[1] == kernel else "", ptx()))
    return _ENTRY.sub(lambda entry: _with_fixed(entry, fixed), alone) if fixed else alone


def _with_fixed(entry: re.Match[str], fixed: Mapping[str, int]) -> str:
    name, head, body = entry.groups()
    parameters = dict(zip(_PARAMETER.findall(head), ARGUMENTS_V2, strict=True))
    kept = [line for line in head.split(",") if parameters[_PARAMETER.findall(line)[0]] not in fixed]

    def load(match: re.Match[str]) -> str:
        kind, register, parameter = match.groups()
        argument = parameters[parameter]
        return f"mov.{kind}{register}, {fixed[argument]};" if argument in fixed else match[0]

    return f".visible .entry {name}({','.join(kept).rstrip()}\n){_LOAD.sub(load, body)}"
