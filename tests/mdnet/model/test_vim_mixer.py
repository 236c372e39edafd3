"""The mixer of a training step against the one that autograd differentiates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mdnet.model.config import preset
from mdnet.model.vim import Mixer

CONFIG = dataclasses.replace(preset("demo"), vim_dim=24, fusion_heads=2, vim_state=5)


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(0)
    made = Mixer(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():  # the usual start has symmetric directions and weights of one
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made


def outcome(mixer: Mixer, tokens: Tensor, *, training: bool, amp: bool = False) -> dict[str, Tensor]:
    """The output, and the gradients of the tokens and of all parameters."""
    mixer.train(training).zero_grad()
    tokens = tokens.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = mixer(tokens)
    assert out.grad_fn is not None
    assert ("_Mix" in out.grad_fn.name()) == training  # else one would be compared with itself
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    assert tokens.grad is not None
    grads = {name: parameter.grad for name, parameter in mixer.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(mixer.parameters()))
    return {"output": out.detach(), "tokens": tokens.grad, **grads}


@pytest.mark.parametrize("length", [1, 2, 3, 4, 70])  # shorter than the convolution, and longer than a tile of the scan
def test_output_and_gradients_are_those_of_autograd(mixer: Mixer, length: int) -> None:
    tokens = torch.randn(3, length, CONFIG.vim_dim, dtype=torch.float64)
    mixer.double()
    expected = outcome(mixer, tokens, training=False)
    for name, value in outcome(mixer, tokens, training=True).items():
        assert value.dtype == expected[name].dtype
        assert value.shape == expected[name].shape
        # A is float32 in both. A lone step gives it no gradient.
        assert (value - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


def test_tokens_need_not_be_contiguous(mixer: Mixer) -> None:
    tokens = torch.randn(9, 2, CONFIG.vim_dim).transpose(0, 1)
    mixer.train()
    assert torch.equal(mixer(tokens), mixer(tokens.contiguous()))


def test_under_autocast_products_are_bfloat16_and_gradients_float32(mixer: Mixer) -> None:
    tokens = torch.randn(3, 40, CONFIG.vim_dim)
    expected = outcome(mixer, tokens, training=True)
    for name, value in outcome(mixer, tokens, training=True, amp=True).items():
        assert value.dtype == (torch.bfloat16 if name == "output" else torch.float32)
        error = (value - expected[name]).norm() / expected[name].norm()
        assert 1e-4 < error < 0.05, name  # eight bits of mantissa, and sums of them
