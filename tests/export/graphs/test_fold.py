"""Folding changes the computation, not its result; the encoder's proof is in tests/mdnet/model/test_diffusion.py."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import stock_diffusion as stock
import torch

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.model.net import random_mdnet
from mdnet_export.graphs.export import EncoderGraph
from mdnet_export.graphs.fold import fold_diffusion, fold_vim, with_shared_weights

IMAGE = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_folded_vim_gives_the_same_tokens() -> None:
    vim = random_mdnet(preset("demo"), 0).vim
    folded = with_shared_weights(vim)
    fold_vim(folded)
    with torch.no_grad():
        torch.testing.assert_close(folded(IMAGE), vim(IMAGE), rtol=0, atol=1e-5)


# A scaling other than 1, which no tiny VAE that was published has, must not be lost.
CONFIGS = {**stock.SMALL, "taesd, scaled": dataclasses.replace(stock.SMALL["taesd"], vae_scaling=0.5)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_folding_is_exact_in_double_precision(config: MDNetConfig) -> None:
    torch.manual_seed(0)
    encoder = DiffusionEncoder(config).double()
    image = IMAGE.permute(0, 3, 1, 2).double() / 127.5 - 1
    folded = with_shared_weights(encoder)
    fold_diffusion(folded)
    with torch.no_grad():
        expected = encoder.unet(encoder.vae(image), 1, encoder.context.expand(2, -1, -1))
        got = folded.unet.encode(folded.vae.encoder(image), None, None)
    for name, feature in got.items():
        assert (feature - expected[name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_folding_leaves_the_model_as_it_was(config: MDNetConfig) -> None:
    model = random_mdnet(config, 0)
    before = copy.deepcopy(model.state_dict())
    EncoderGraph(model.diffusion)
    fold_vim(with_shared_weights(model.vim))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_shared_weights_take_no_memory() -> None:
    vim = random_mdnet(preset("demo"), 0).vim
    shared = with_shared_weights(vim)
    assert shared.layers[0] is not vim.layers[0]
    pairs = zip(shared.parameters(), vim.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
