"""A distilled VAE encoder from files with diffusers' and TAESD's layout, against stock diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import stock_diffusion as stock
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from mdnet.model.config import preset
from mdnet.model.diffusion import TinyVAEEncoder
from mdnet.weights.tiny_vae import open_tiny_vae, take_tiny_vae
from mdnet_engines.errors import MDNetError

CONFIG = stock.SMALL["taesd"]
STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def vae() -> AutoencoderTiny:
    torch.manual_seed(8)
    made = stock.vae(CONFIG).eval()
    assert isinstance(made, AutoencoderTiny)
    return made


def write_taesd(file: Path, vae: AutoencoderTiny) -> None:
    """TAESD's own file: the state dict of its Sequential, so names begin with the layer's number."""
    state = {name: tensor.clone() for name, tensor in vae.encoder.layers.state_dict().items()}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)


@pytest.mark.parametrize("source", ["taesd", "taesd_encoder.safetensors", "taesd_encoder.pth"])
def test_each_layout_gives_stock_latents_to_the_bit(source: str, vae: AutoencoderTiny, tmp_path: Path) -> None:
    if source == "taesd":
        vae.save_pretrained(tmp_path / source)
    else:
        write_taesd(tmp_path / source, vae)
    encoder = TinyVAEEncoder(CONFIG)
    state = take_tiny_vae(open_tiny_vae(tmp_path / source, CONFIG), CONFIG)
    encoder.load_state_dict({name.removeprefix("vae."): tensor.clone() for name, tensor in state.items()})
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(encoder(image), vae.encode(image).latents)


def test_the_files_names_are_taesds_at_its_published_configuration() -> None:
    """15 layers: a convolution and a block, three times a convolution and three blocks, a convolution."""
    with torch.device("meta"):
        names = TinyVAEEncoder(preset("sd15-taesd-vim-s")).encoder.layers.state_dict()
    assert len({name.split(".")[0] for name in names}) == 15
    assert {"0.weight", "0.bias", "1.conv.0.weight", "1.conv.4.bias", "2.weight", "14.weight", "14.bias"} <= set(names)
    assert not {"2.bias", "6.bias", "10.bias"} & set(names)
    assert sum(tensor.numel() for tensor in names.values()) == 1_222_532


def edit_config(**fields: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def without_a_key(folder: Path) -> None:
    file = folder / f"{STEM}.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "encoder.layers.0.bias"}, file)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (edit_config(_class_name="AutoencoderKL"), "_class_name is AutoencoderKL, .* expects AutoencoderTiny"),
        (edit_config(latent_channels=16), "latent_channels is 16, preset demo-taesd expects 4"),
        (edit_config(scaling_factor=0.13025), "scaling_factor is 0.13025, preset demo-taesd expects 1.0"),
        (edit_config(num_encoder_blocks=[1, 3, 3, 3]), r"num_encoder_blocks is \[1, 3, 3, 3\], .* \[1, 2, 2, 2\]"),
        (edit_config(encoder_block_out_channels=[64] * 4), "encoder_block_out_channels is 64, .* expects 32"),
        (lambda folder: (folder / "config.json").unlink(), f"taesd holds {STEM}.safetensors; expected an Autoenc"),
        (lambda folder: (folder / f"{STEM}.safetensors").unlink(), f"holds config.json; expected {STEM}.safetensors"),
        (without_a_key, "does not fit the tiny VAE encoder of preset demo-taesd: missing encoder.layers.0.bias$"),
    ],
)
def test_a_wrong_folder_is_explained_on_one_line(
    break_it: Callable, message: str, vae: AutoencoderTiny, tmp_path: Path
) -> None:
    folder = tmp_path / "taesd"
    vae.save_pretrained(folder)
    break_it(folder)
    with pytest.raises(MDNetError, match=message) as caught:
        take_tiny_vae(open_tiny_vae(folder, CONFIG), CONFIG)
    assert "\n" not in str(caught.value)


def test_the_decoders_file_is_refused(vae: AutoencoderTiny, tmp_path: Path) -> None:
    torch.save(vae.decoder.layers.state_dict(), tmp_path / "taesd_decoder.pth")
    with pytest.raises(MDNetError, match=r"taesd_decoder\.pth does not fit the tiny VAE encoder") as caught:
        take_tiny_vae(open_tiny_vae(tmp_path / "taesd_decoder.pth", CONFIG), CONFIG)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MDNetError, match=r"gone\.pth: no such file"):
        open_tiny_vae(tmp_path / "gone.pth", CONFIG)
