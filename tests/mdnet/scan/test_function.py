"""`mdnet.scan.selective_scan`: states, groups and optional inputs, on the native kernel and on the loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import (
    EVERY_VARIANT_CASE,
    VARIANT_CASES,
    VariantCase,
    assert_close,
    expected_of,
    make_variant_inputs,
)
from torch import Tensor, nn

from mdnet.scan import loop as scan_loop
from mdnet.scan import op_v2, selective_scan
from mdnet_engines.ops import native

STATES_AND_GROUPS = VariantCase("small", 2, 6, 5, 2, reverse=False, groups=2, state=True)


def tensors(case: VariantCase, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The case's inputs by name, views as views."""
    found = {}
    for name, array in make_variant_inputs(case).items():
        if array.dtype.name == "bfloat16":  # NumPy has it from a package that PyTorch does not know
            found[name] = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            found[name] = torch.from_numpy(array)
    return {name: tensor.to(dtype) for name, tensor in found.items()} if dtype else found


def options(case: VariantCase) -> dict[str, Any]:
    return {"reverse": case.reverse, "delta_softplus": case.softplus}


@pytest.fixture(params=["native", "loop"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "native":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("mdnet was installed without its native library")
    return request.param


@pytest.mark.parametrize("case", EVERY_VARIANT_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: VariantCase, host: str) -> None:
    inputs = tensors(case)
    y, h_last = selective_scan(**inputs, **options(case), return_last_state=True)
    expected, state = expected_of(case, make_variant_inputs(case))
    assert y.dtype == inputs["u"].dtype
    assert h_last.dtype == torch.float32
    assert y.is_contiguous()
    assert_close(y.double().numpy(), expected, case.dtype)
    assert_close(h_last.numpy(), state)
    torch.testing.assert_close(selective_scan(**inputs, **options(case)), y, rtol=0, atol=0)


def naive(case: VariantCase, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula in differentiable operations, to be differentiated by autograd."""
    u, delta, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    dt = delta + inputs["delta_bias"][:, None] if "delta_bias" in inputs else delta
    dt = torch.nn.functional.softplus(dt) if case.softplus else dt
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) if x.ndim == 4 else x[:, None] for x in (B, C))
    h = inputs.get("h0", u.new_zeros(*u.shape[:2], A.shape[1]))
    y: list[Tensor] = []
    for t in reversed(range(u.shape[2])) if case.reverse else range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        y.append((h * C[..., t]).sum(-1))
    total = torch.stack(y[::-1] if case.reverse else y, dim=2)
    total = total + inputs["D"][:, None] * u if "D" in inputs else total
    return total * torch.nn.functional.silu(inputs["z"]) if "z" in inputs else total, h


GENTLE_CASES = [case for case in VARIANT_CASES if case.delta_mean == 0]


@pytest.mark.parametrize("case", GENTLE_CASES, ids=lambda case: case.name)
def test_gradients_agree_with_autograd_through_the_formula(case: VariantCase, host: str) -> None:
    wide = {name: tensor.double().requires_grad_() for name, tensor in tensors(case).items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors(case).items()}
    exact, mine = naive(case, wide), selective_scan(**leaves, **options(case), return_last_state=True)
    random = np.random.default_rng(1)
    upstream = [torch.from_numpy(random.standard_normal(x.shape)) for x in exact]
    expected = torch.autograd.grad(exact, list(wide.values()), upstream)
    got = torch.autograd.grad(mine, list(leaves.values()), [x.float() for x in upstream])
    for name, one, other in zip(leaves, got, expected, strict=True):
        assert one.dtype == torch.float32
        # Sums of up to batch × channels × length products of float32: ten times what the forward pass is allowed.
        assert (one - other).abs().max() <= 3e-5 * other.abs().max(), name


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [4, 66])  # one tile of the kernel, and two
def test_gradient_is_exact(
    length: int, reverse: bool, groups: int, without: tuple[str, ...], softplus: bool, host: str
) -> None:
    case = VariantCase(
        "gradcheck", 1, 6, length, 2, reverse, groups=groups, without=without, softplus=softplus, state=True
    )
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors(case, torch.float64).items()}

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(inputs, values, strict=True)), **options(case), return_last_state=True)

    # All of a long case's Jacobian takes minutes: one random direction of it.
    assert torch.autograd.gradcheck(scan, tuple(inputs.values()), fast_mode=length > 4)


def test_gradients_flow_through_pieces(host: str) -> None:
    """Half of the loss is in the second piece, and reaches the first through the state alone."""
    case = VariantCase("pieces", 2, 6, 70, 3, reverse=False, groups=2, state=True)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors(case, torch.float64).items()}
    whole = selective_scan(**leaves)
    state, pieces = leaves["h0"], []
    for span in (slice(0, 33), slice(33, 70)):
        of_piece = {n: x[..., span] if n in ("u", "delta", "B", "C", "z") else x for n, x in leaves.items()}
        y, state = selective_scan(**{**of_piece, "h0": state}, return_last_state=True)
        pieces.append(y)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), list(leaves.values()))
    got = torch.autograd.grad((torch.cat(pieces, -1) * weights).sum(), list(leaves.values()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@settings(deadline=None)
@given(cut=st.integers(1, 69), reverse=st.booleans(), groups=st.sampled_from([0, 2]))
def test_a_cut_gives_the_whole_bit_for_bit(cut: int, reverse: bool, groups: int) -> None:
    if native.library() is None:
        pytest.skip("the loop's products may depend on their sizes")
    case = VariantCase("cut", 2, 6, 70, 3, reverse=reverse, groups=groups, state=True)
    inputs = tensors(case)
    whole = selective_scan(**inputs, reverse=reverse, return_last_state=True)
    state, results = inputs["h0"], {}
    spans = (slice(0, cut), slice(cut, 70))
    for span in spans[::-1] if reverse else spans:
        of_piece = {n: x[..., span] if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()}
        results[span.start], state = selective_scan(
            **{**of_piece, "h0": state}, reverse=reverse, return_last_state=True
        )
    assert torch.equal(torch.cat([results[0], results[cut]], -1), whole[0])
    assert torch.equal(state, whole[1])


def test_the_first_version_serves_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles, TensorRT's plugin and the CUDA kernel know its node alone."""
    called = []
    monkeypatch.setattr(op_v2, "selective_scan_v2", lambda *_: called.append(2) or (torch.zeros(1), torch.zeros(1)))
    plain = tensors(VariantCase("plain", 1, 3, 4, 2, reverse=False))
    selective_scan(**plain)
    assert not called
    others: list[dict[str, Any]] = [
        *({name: None} for name in ("D", "z", "delta_bias")),
        {"delta_softplus": False},
        {"h0": torch.zeros(1, 3, 2)},
        {"return_last_state": True},
        {name: plain[name][:, None] for name in ("B", "C")},
    ]
    for changed in others:
        selective_scan(**{**plain, **changed})
    assert len(called) == len(others)


def test_operator_is_well_formed(host: str) -> None:
    """Schema, fake, autograd registration and tracing, as PyTorch checks them."""
    inputs = {name: tensor.requires_grad_() for name, tensor in tensors(STATES_AND_GROUPS).items()}
    for last_state in (True, False):
        for missing in ({}, dict.fromkeys(("D", "z", "delta_bias", "h0"))):
            arguments = {**inputs, **missing}
            order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")
            torch.library.opcheck(
                op_v2.selective_scan_v2, (*(arguments[name] for name in order), False, True, last_state)
            )


class TwoPieces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        inputs = {**inputs, "u": inputs["u"] * self.scale[:, None]}
        y, state = selective_scan(**inputs, return_last_state=True)
        return y + selective_scan(**{**inputs, "h0": state})


def test_compiles_without_graph_breaks() -> None:
    inputs, module = tensors(STATES_AND_GROUPS), TwoPieces()
    compiled = torch.compile(module, fullgraph=True)
    expected, got = module(inputs), compiled(inputs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), module.scale)[0] for y in (expected, got)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time_join(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(VariantCase("chunks", 2, 6, 23, 4, reverse=reverse, groups=2, state=True))
    whole = scan_loop.scan(**inputs, reverse=reverse)
    monkeypatch.setattr(scan_loop, "_CHUNK_BYTES", 5 * whole[1].nbytes)
    torch.testing.assert_close(scan_loop.scan(**inputs, reverse=reverse), whole, rtol=0, atol=0)


REFUSED = {
    "B is (2, 4, 2, 5): its 4 groups": {name: torch.zeros(2, 4, 2, 5) for name in ("B", "C")},
    "B is (2, 0, 2, 5): its 0 groups": {name: torch.zeros(2, 0, 2, 5) for name in ("B", "C")},
    "B is (2, 2, 2, 5), C (2, 2, 5): both": {"C": torch.zeros(2, 2, 5)},
    "C is (2, 3, 2, 5), but u (2, 6, 5) and A (6, 2) need (2, 2, 2, 5)": {"C": torch.zeros(2, 3, 2, 5)},
    "h0 is (2, 2, 6), but u (2, 6, 5) and A (6, 2) need (2, 6, 2)": {"h0": torch.zeros(2, 2, 6)},
    "z is (2, 6, 4)": {"z": torch.zeros(2, 6, 4)},
    "h0 is on meta, u on cpu": {"h0": torch.zeros(2, 6, 2, device="meta")},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_makes_no_sense_is_refused_in_words(words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        selective_scan(**{**tensors(STATES_AND_GROUPS), **REFUSED[words]})
    assert words in str(error.value)


def test_a_state_of_whole_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"h0 is torch\.int64"):
        selective_scan(**{**tensors(STATES_AND_GROUPS), "h0": torch.zeros(2, 6, 2, dtype=torch.int64)})
