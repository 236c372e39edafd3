"""Executes PTX on a CPU: every thread of a grid is an element of NumPy arrays.

    memory = Global()
    arguments = [memory.input("u", u), …, channels, …, memory.output("y", u.nbytes)]
    launch(ptx, "selective_scan_forward_f32_n16", grid, block, arguments, memory)
    y = memory.result("y")

It knows the instructions that NVRTC makes of `selective_scan.cu`, and refuses others by name. `arithmetic` says how
exactly it computes. `PtxError` names the line of what a GPU may do silently: an access out of bounds, misaligned, or to
shared memory that was never written; a race in shared memory between two barriers; threads that part ways at a barrier
or a shuffle; an output written twice or never.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from ptx_on_cpu.blocks import Program, translate
from ptx_on_cpu.machine import Machine
from ptx_on_cpu.memory import Global
from ptx_on_cpu.parse import PtxError, parse

__all__ = ["Global", "PtxError", "launch"]


def launch(
    ptx: str, kernel: str, grid: Sequence[int], block: Sequence[int], arguments: Sequence[int], memory: Global
) -> None:
    """Run one launch to its end.

    Args:
        arguments: of the kernel, in its order: addresses in `memory`, and integers.

    Raises:
        PtxError: the text is not understood, or the launch does something that it may not.
    """
    Machine(_program(ptx, kernel), grid, block, arguments, memory).run()


@functools.lru_cache(maxsize=8)
def _program(ptx: str, kernel: str) -> Program:
    return translate(parse(ptx, kernel))
