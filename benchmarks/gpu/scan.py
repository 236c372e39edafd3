"""`selective_scan.cu` and mamba-ssm's kernel against float64, on fresh random inputs; outputs poisoned before."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu.context import CheckFailed, Context, NotInstalled
from gpu.kernels import Kernel, both, cases_module, double, open_kernel, random_tensors, tensors
from gpu.results import Figure
from mdnet.scan import loop as scan_loop
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops.scan_shapes import INPUTS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAMBA = "mamba-ssm's kernel and its gradient"
_MAMBA_TOLERANCE = 2e-4
"""Of the largest value, in float32. It bounds another project's kernel, whose arithmetic we don't know."""


def run(context: Context) -> None:
    """A row for each type and direction of our kernel, one for mamba-ssm's."""
    cases = {f"{_name(d)}, {'reverse' if r else 'forward'}": (d, r) for d in DTYPES for r in (False, True)}
    context.expect(*cases, MAMBA)
    kernel, what = open_kernel(context.device, context.scratch)
    for name, (dtype, reverse) in cases.items():
        context.attempt(name, functools.partial(check, context, kernel, what, dtype, reverse))
    context.attempt(MAMBA, functools.partial(check_mamba, context))


def check(context: Context, kernel: Kernel, what: str, dtype: torch.dtype, reverse: bool) -> dict[str, Figure]:
    """Run every case of one type and direction, with each kernel; any that is off fails the row, which names it."""
    seed, wrong, largest, count = secrets.randbelow(2**31), [], 0.0, 0

    def compare(name: str, got: Tensor, expected: np.ndarray, kind: str) -> None:
        nonlocal largest
        made = got.double().cpu().numpy()
        if not np.isfinite(made).all():
            wrong.append(f"{name} (not finite)")
            return
        try:
            cases_module().assert_close(made, expected, kind, cases_module().CUDA_TOLERANCE)
        except AssertionError as error:
            wrong.append(f"{name} ({error})")
        largest = max(largest, float(np.max(np.abs(made - expected)) / np.max(np.abs(expected))))

    for case, inputs, expected in _cases(context, dtype, reverse, seed):
        for small in both(inputs["A"].shape[1]):
            name = f"{case}, small" if small else case
            y = torch.full_like(inputs["u"], math.nan)
            kernel(inputs, y, reverse=reverse, small=small)
            count += 1
            compare(name, y, expected, _name(dtype))
    for case, inputs, expected, last in _variants(context, dtype, reverse, seed):
        y = torch.full_like(inputs["u"], math.nan)
        h_last = torch.full_like(inputs["h0"], math.nan) if case.state else None
        kernel(inputs, y, reverse=reverse, softplus=case.softplus, h_last=h_last)
        count += 1
        compare(f"{case.name}, version 2", y, expected, _name(dtype))
        if h_last is not None:
            compare(f"{case.name}, last state", h_last, last, "float32")
    figures: dict[str, Figure] = {"cases": count, "largest error, of the largest output": largest, "seed": seed}
    if wrong:
        raise CheckFailed(f"{len(wrong)} of {count} cases are wrong: {'; '.join(wrong)[:200]}", figures)
    return {**figures, "note": f"run by {what}"}


def _cases(
    context: Context, dtype: torch.dtype, reverse: bool, seed: int
) -> Iterator[tuple[str, dict[str, Tensor], np.ndarray]]:
    """Name, inputs and the float64 reference: of the shared table, then of the large shapes."""
    table, device = cases_module(), context.device
    for place, case in enumerate(table.EVERY_CASE):
        if (case.dtype, case.reverse) != (_name(dtype), reverse) or case.elements > context.sizes.case_elements:
            continue
        inputs = tensors(table.make_inputs(case, seed + place), dtype, device)
        arrays = {name: value.double().cpu().numpy() for name, value in inputs.items()}
        yield case.name, inputs, table.reference_scan(**arrays, reverse=reverse)
    for sizes in context.sizes.large_scans:
        inputs = random_tensors(sizes, dtype, device, seed)
        wide = double(inputs)
        expected, _ = scan_loop.scan(*(wide[name] for name in INPUTS), reverse=reverse)
        yield "×".join(map(str, sizes)), inputs, expected.cpu().numpy()


def _variants(
    context: Context, dtype: torch.dtype, reverse: bool, seed: int
) -> Iterator[tuple[Any, dict[str, Tensor], np.ndarray, np.ndarray]]:
    """Version 2's cases of the shared table, which the kernels have registers for: inputs, y and the last state."""
    table = cases_module()
    for place, case in enumerate(table.EVERY_VARIANT_CASE):
        if (case.dtype, case.reverse) != (_name(dtype), reverse) or case.elements > context.sizes.case_elements:
            continue
        if case.states > cuda_kernel.MAX_STATES:
            continue
        inputs = tensors(table.make_variant_inputs(case, seed + place), dtype, context.device)
        arrays = {name: value.double().cpu().numpy() for name, value in inputs.items()}
        yield case, inputs, *table.expected_of(case, arrays)


def check_mamba(context: Context) -> dict[str, Figure]:
    """mamba-ssm's kernel as training runs it, and its gradient, against our loop in float64."""
    sizes, device = context.sizes.large_scans[-1], context.device
    given = random_tensors(sizes, torch.float32, device, secrets.randbelow(2**31))
    if not scan_mamba.available(given["u"], given["A"]):
        raise NotInstalled(scan_mamba.problem(given["u"].device) if device.is_cuda else "mamba-ssm, which needs CUDA")
    inputs, wide = ([each[name] for name in INPUTS] for each in (given, double(given)))
    grad = torch.randn_like(given["u"])
    largest = 0.0
    for reverse in (False, True):
        found = [scan_mamba.scan(*inputs, reverse=reverse), *scan_mamba.scan_backward(grad, *inputs, reverse=reverse)]
        expected = [
            scan_loop.scan(*wide, reverse=reverse)[0],
            *scan_loop.scan_backward(grad.double(), *wide, reverse=reverse)[: len(INPUTS)],
        ]
        for got, right in zip(found, expected, strict=True):
            largest = max(largest, float((got.double() - right).abs().max() / right.abs().max()))
    if not largest <= _MAMBA_TOLERANCE:
        raise CheckFailed(f"off by {largest:.3g} of the largest value, allowed is {_MAMBA_TOLERANCE:g}")
    return {"largest error, of the largest value": largest}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
