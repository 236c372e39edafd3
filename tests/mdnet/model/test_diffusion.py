"""The frozen encoder against stock diffusers models that hold the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import stock_diffusion as stock
import torch
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.diffusion import DiffusionEncoder


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
def test_features_equal_stock_diffusers(run: Callable) -> None:
    check_against_stock(preset("demo"), run)


@pytest.mark.slow
def test_folded_features_equal_stock_diffusers_at_the_sd15_configuration() -> None:
    check_against_stock(preset("sd15-vim-s"), run_folded)


def test_the_encoder_is_frozen_in_training_mode() -> None:
    encoder = DiffusionEncoder(preset("demo")).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
