"""The frozen encoder against stock diffusers models that hold the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import stock_diffusion as stock
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.diffusion import DiffusionEncoder, TinyVAEEncoder, to_vae_range


def stock_features(encoder: DiffusionEncoder, config: MDNetConfig, image: Tensor) -> dict[str, Tensor]:
    """What diffusers' own VAE and U-Net give on the encoder's weights. The decoder halves stay on the meta device."""
    with torch.device("meta"):
        vae, unet = stock.vae(config), stock.unet(config)
    for model, ours in ((vae, encoder.vae), (unet, encoder.unet)):
        result = model.load_state_dict(ours.state_dict(), strict=False, assign=True)
        assert not result.unexpected_keys
        halves = ("decoder.", "post_quant_conv.", "up_blocks.", "conv_norm_out.", "conv_out.")
        assert all(key.startswith(halves) for key in result.missing_keys)
    return stock.features(vae, unet, encoder.context, config.timestep, image)


def check_against_stock(config: MDNetConfig, run: Callable[[DiffusionEncoder, Tensor], dict[str, Tensor]]) -> None:
    torch.manual_seed(1)
    encoder = DiffusionEncoder(config)
    image = torch.randint(0, 256, (2, config.image_size, config.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = stock_features(encoder, config, image)
        got = run(encoder, image)
    assert list(got) == list(config.feature_shapes)
    for name, feature in got.items():
        assert tuple(feature.shape[1:]) == config.feature_shapes[name]
        # The contract's bound: float32 rounding through some sixty layers.
        assert (feature - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def run_folded(encoder: DiffusionEncoder, image: Tensor) -> dict[str, Tensor]:
    from mdnet_export.graphs.export import EncoderGraph

    features = EncoderGraph(encoder)(image)
    return dict(zip(("down_s16", "down_s32", "mid_s64"), features, strict=True))


@pytest.mark.parametrize("run", [DiffusionEncoder.__call__, run_folded], ids=["unfolded", "folded"])
@pytest.mark.parametrize("encoder", stock.SMALL)
def test_features_equal_stock_diffusers(encoder: str, run: Callable) -> None:
    check_against_stock(stock.SMALL[encoder], run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15-vim-s", "sd21-vim-s", "sd15-taesd-vim-s"])
def test_folded_features_equal_stock_diffusers_at_the_full_configuration(name: str) -> None:
    check_against_stock(preset(name), run_folded)


def test_a_tiny_vae_gives_stock_latents_to_the_bit() -> None:
    """Of images in [-1, 1], whose range diffusers' encoder moves to TAESD's [0, 1]."""
    config = stock.SMALL["taesd"]
    torch.manual_seed(1)
    vae = stock.vae(config)
    ours = TinyVAEEncoder(config)
    ours.load_state_dict({name: value for name, value in vae.state_dict().items() if name.startswith("encoder.")})
    image = torch.randint(0, 256, (2, config.image_size, config.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = vae.encode(to_vae_range(image)).latents
        assert torch.equal(ours(to_vae_range(image)), expected)
        # What TAESD's own code does: the layers alone, on values in [0, 1].
        unit = vae.encoder.layers(image.permute(0, 3, 1, 2) / 255)
    torch.testing.assert_close(unit, expected, rtol=0, atol=1e-5)


def test_heads_differ_by_level_where_the_configuration_says_so() -> None:
    """They leave no trace in the weights: another count gives other features on the same ones."""
    config = stock.SMALL["sd21"]
    torch.manual_seed(1)
    encoder, other = DiffusionEncoder(config), DiffusionEncoder(dataclasses.replace(config, unet_heads=2))
    other.load_state_dict(encoder.state_dict())
    attentions = [module for module in encoder.modules() if isinstance(module, Attention)]
    assert sorted({attention.heads for attention in attentions}) == [1, 2, 3, 4]  # 1: the VAE's
    image = torch.randint(0, 256, (1, config.image_size, config.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert not torch.allclose(encoder(image)["down_s16"], other(image)["down_s16"], atol=1e-3)


def test_the_encoder_is_frozen_in_training_mode() -> None:
    encoder = DiffusionEncoder(preset("demo")).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
