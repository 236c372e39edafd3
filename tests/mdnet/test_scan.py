"""The PyTorch operator against the float64 reference that every host is held to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scan_cases import SCAN_CASES, ScanCase, make_inputs, reference_scan
from torch import Tensor

from mdnet import scan
from mdnet.scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SMALL = ScanCase("small", batch=2, channels=3, length=5, states=4, reverse=False)


def tensors(case: ScanCase, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    inputs = make_inputs(case)
    return [torch.from_numpy(np.asarray(inputs[name])).to(dtype) for name in NAMES]


@pytest.mark.parametrize("case", SCAN_CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: ScanCase) -> None:
    expected = reference_scan(**make_inputs(case), reverse=case.reverse)
    got = selective_scan(*tensors(case), case.reverse).double().numpy()
    assert got.shape == expected.shape
    # float32 state and sums; the project's bound for every host.
    assert np.abs(got - expected).max() <= 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time_join(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(ScanCase("chunks", batch=2, channels=3, length=23, states=4, reverse=reverse))
    whole = selective_scan(*inputs, reverse)
    state_bytes = 2 * 3 * 4 * 4
    monkeypatch.setattr(scan, "_CHUNK_BYTES", 5 * state_bytes)
    torch.testing.assert_close(selective_scan(*inputs, reverse), whole, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_is_exact(reverse: bool) -> None:
    inputs = [tensor.requires_grad_() for tensor in tensors(SMALL, torch.float64)]
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, reverse), inputs)


@pytest.mark.parametrize("reverse", [False, True])
def test_operator_is_well_formed(reverse: bool) -> None:
    """Schema, fake, autograd registration and tracing, as PyTorch checks them."""
    inputs = [tensor.requires_grad_() for tensor in tensors(SMALL)]
    torch.library.opcheck(selective_scan, (*inputs, reverse))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float_state(dtype: torch.dtype) -> None:
    case = ScanCase("long", batch=1, channels=4, length=512, states=8, reverse=False)
    rounded = [tensor.to(dtype).float() for tensor in tensors(case)]
    got = selective_scan(*(tensor.to(dtype) for tensor in rounded))
    expected = selective_scan(*rounded)
    assert got.dtype == dtype
    # Only the output is rounded: half a unit in the last place of the type.
    bound = torch.finfo(dtype).eps * expected.abs().max()
    assert (got.float() - expected).abs().max() <= bound


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_a_wrong_shape_is_named_with_the_right_one(name: str) -> None:
    inputs = dict(zip(NAMES, tensors(SMALL), strict=True))
    inputs[name] = torch.randn(*(size + 1 for size in inputs[name].shape))
    with pytest.raises((ValueError, RuntimeError)) as error:
        selective_scan(**inputs)
    if name != "A":
        assert str(tuple(inputs[name].shape)) in str(error.value)
        assert name in str(error.value)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_empty_axis_is_refused(axis: int) -> None:
    inputs = tensors(SMALL)
    shape = list(inputs[0].shape)
    shape[axis] = 0
    inputs[0] = torch.zeros(shape)
    with pytest.raises(ValueError, match="empty axis"):
        selective_scan(*inputs)
