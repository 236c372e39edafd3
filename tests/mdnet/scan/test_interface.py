"""mamba-ssm's functions on our scan: every argument, and foreign models that call them in place of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign_models import FOREIGN, built, language_model, ours_in_transformers, slow_scan
from torch import Tensor

from mdnet.scan import (
    causal_conv1d_fn,
    mamba_chunk_scan_combined,
    selective_scan,
    selective_scan_fn,
    selective_state_update,
)
from mdnet_engines.errors import MDNetError

LIMIT = 3e-6  # relative to the largest value: float32, states of a few hundred steps


def close(got: Tensor, expected: Tensor, limit: float = LIMIT) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= limit * expected.abs().max()


def scan_inputs(mix: tuple[int, ...] = (2, 4, 9), *, channels: int = 6, states: int = 4, length: int = 9) -> dict:
    torch.manual_seed(0)
    row = (2, channels, length)
    return {
        "u": torch.randn(row),
        "delta": torch.randn(row),
        "A": -torch.rand(channels, states),
        "B": torch.randn(mix),
        "C": torch.randn(mix),
        "D": torch.randn(channels),
        "z": torch.randn(row),
        "delta_bias": torch.randn(channels),
    }


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("mix", [(2, 4, 9), (2, 1, 4, 9), (2, 3, 4, 9), (6, 4)])
def test_every_argument_of_mamba_ssm_has_its_meaning(
    mix: tuple[int, ...], without: tuple[str, ...], softplus: bool
) -> None:
    inputs = {name: value for name, value in scan_inputs(mix).items() if name not in without}
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs = {name: value.abs() if name == "delta_bias" else value for name, value in inputs.items()}
    for got, expected in zip(
        selective_scan_fn(**inputs, delta_softplus=softplus, return_last_state=True),
        slow_scan(**inputs, delta_softplus=softplus, return_last_state=True),
        strict=True,
    ):
        close(got, expected)


def test_b_and_c_may_differ_in_form() -> None:
    inputs = scan_inputs((2, 3, 4, 9))
    shared = inputs["C"][:, 1]
    expected = slow_scan(**{**inputs, "C": shared[:, None].repeat(1, 3, 1, 1)})
    close(selective_scan_fn(**{**inputs, "C": shared}), expected)
    constant = torch.randn(6, 4)
    expected = slow_scan(
        **{**inputs, "B": inputs["B"].repeat_interleave(2, 1), "C": constant[None, ..., None].expand(2, -1, -1, 9)}
    )
    close(selective_scan_fn(**{**inputs, "C": constant}), expected)


def test_one_group_is_what_version_1_of_the_operator_has() -> None:
    exported = torch.export.export(Call(scan_inputs((2, 1, 4, 9))), (torch.randn(2, 6, 9),))
    called = [str(node.target) for node in exported.graph.nodes if "mdnet" in str(node.target)]
    assert called == ["mdnet.selective_scan.default"]


class Call(torch.nn.Module):
    def __init__(self, inputs: dict):
        super().__init__()
        self.inputs = inputs

    def forward(self, u: Tensor) -> Tensor:
        return selective_scan_fn(**{**self.inputs, "u": u}, delta_softplus=True)


def test_gradients_are_those_of_the_formula() -> None:
    mine, theirs = ({n: x.clone().requires_grad_() for n, x in scan_inputs((2, 3, 4, 9)).items()} for _ in range(2))
    for inputs, scan in ((mine, selective_scan_fn), (theirs, slow_scan)):
        y, last = scan(**inputs, delta_softplus=True, return_last_state=True)
        (y.sin().sum() + last.sin().sum()).backward()
    for name, tensor in mine.items():
        close(tensor.grad, theirs[name].grad, 10 * LIMIT)


@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_complex_parameters_are_refused(name: str) -> None:
    inputs = scan_inputs()
    with pytest.raises(MDNetError, match=rf"{name} is torch\.complex64.*no counterpart"):
        selective_scan_fn(**{**inputs, name: inputs[name].to(torch.complex64)})


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C"])
def test_a_missing_tensor_is_named(name: str) -> None:
    for scan in (selective_scan, selective_scan_fn):
        with pytest.raises(TypeError, match=rf"^{name} is NoneType.*D, z, delta_bias, h0 may be None"):
            scan(**{**scan_inputs(), name: None})


def test_arguments_without_counterpart_are_refused() -> None:
    with pytest.raises(MDNetError, match="cu_seqlens has no counterpart"):
        selective_scan_fn(**scan_inputs(), cu_seqlens=torch.tensor([0, 4, 9]))
    with pytest.raises(MDNetError, match="seq_idx has no counterpart"):
        causal_conv1d_fn(torch.randn(1, 2, 5), torch.randn(2, 4), seq_idx=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d_fn(torch.randn(1, 2, 5), torch.randn(2, 4), activation="relu")


@pytest.mark.parametrize("gate", [True, False])
def test_steps_give_the_scan_of_the_whole(gate: bool) -> None:
    inputs = scan_inputs()
    if not gate:
        inputs = {**inputs, "z": None, "D": None, "delta_bias": None}
    expected, last = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    u, delta, A, B, C, D, z, bias = inputs.values()
    state = torch.zeros(2, 6, 4)
    for t in range(9):
        z_t = None if z is None else z[..., t]
        y = selective_state_update(state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z_t, bias, True)
        close(y, expected[..., t], 2 * LIMIT)
    close(state, last)


def mamba2_inputs(length: int = 9, heads: int = 4, channels: int = 3, groups: int = 2, states: int = 5) -> dict:
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, length, heads, channels),
        "dt": torch.randn(2, length, heads),
        "A": -torch.rand(heads),
        "B": torch.randn(2, length, groups, states),
        "C": torch.randn(2, length, groups, states),
        "chunk_size": 4,
        "D": torch.randn(heads),
        "z": torch.randn(2, length, heads, channels),
        "dt_bias": torch.randn(heads),
        "initial_states": torch.randn(2, heads, channels, states),
    }


@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.5, 1.0)])
@pytest.mark.parametrize("without", [(), ("D", "z", "dt_bias", "initial_states")])
def test_a_scan_by_heads_is_a_scan_for_each_head(without: tuple[str, ...], limit: tuple[float, float]) -> None:
    inputs = {name: None if name in without else value for name, value in mamba2_inputs().items()}
    got, states = mamba_chunk_scan_combined(**inputs, dt_softplus=True, dt_limit=limit, return_final_states=True)
    x, dt, A, B, C, _, D, z, bias, h = inputs.values()
    h = torch.zeros(2, 4, 3, 5) if h is None else h
    dt = F.softplus(dt if bias is None else dt + bias).clamp(*limit)
    for t in range(x.shape[1]):
        B_t, C_t = (mix[:, t].repeat_interleave(2, 1)[:, :, None] for mix in (B, C))  # (2, heads, 1, states)
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B_t
        y = (h * C_t).sum(-1)
        y = y if D is None else y + D[:, None] * x[:, t]
        y = y if z is None else y * F.silu(z[:, t])
        close(got[:, t], y, 2 * LIMIT)
    close(states, h)


def test_a_step_by_heads_continues_the_scan_by_heads() -> None:
    inputs = mamba2_inputs()
    whole, last = mamba_chunk_scan_combined(**inputs, dt_softplus=True, return_final_states=True)
    x, dt, A, B, C, _, D, z, bias, state = inputs.values()

    def each(tensor: Tensor) -> Tensor:
        return tensor[..., None].expand(*tensor.shape, 3)

    for t in range(9):
        A_, D_, bias_ = each(A)[..., None].expand(-1, -1, 5), each(D), each(bias)
        y = selective_state_update(state, x[:, t], each(dt[:, t]), A_, B[:, t], C[:, t], D_, z[:, t], bias_, True)
        close(y, whole[:, t], 2 * LIMIT)
    close(state, last)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_in_pieces_is_that_of_the_whole(activation: str | None, bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(2, 3, 11), torch.randn(3, 4), torch.randn(3) if bias else None
    expected = F.conv1d(F.pad(x, (3, 0)), weight[:, None], offset, groups=3)
    expected = expected if activation is None else F.silu(expected)
    pieces, state = [], None
    for piece in x.split([1, 2, 5, 1, 2], -1):
        y, state = causal_conv1d_fn(
            piece, weight, offset, initial_states=state, return_final_states=True, activation=activation
        )
        assert state.shape == (2, 3, 3)
        pieces.append(y)
    close(torch.cat(pieces, -1), expected)
    torch.testing.assert_close(state, x[..., -3:], rtol=0, atol=0)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_gives_its_own_result_on_our_scan(name: str) -> None:
    if name == "mambapy":
        pytest.importorskip("mambapy")
    model, inputs = built(name)
    with torch.no_grad():
        expected = model(*inputs)
        with FOREIGN[name].ours(model):
            close(model(*inputs), expected)


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba", "jamba", "mamba2"])
def test_transformers_generates_the_same_tokens_on_our_scan(kind: str) -> None:
    model = language_model(kind)
    tokens = torch.randint(1, 40, (2, 7))
    settings = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(tokens, **settings)
    with ours_in_transformers(kind):
        got = model.generate(tokens, **settings)
    np.testing.assert_array_equal(got.sequences, expected.sequences)
    for mine, theirs in zip(got.logits, expected.logits, strict=True):
        close(mine, theirs)
