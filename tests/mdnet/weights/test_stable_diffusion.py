"""Stable Diffusion's files in every published layout: the imported encoder gives stock diffusers' features."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_weights as published
import pytest
import stock_diffusion as stock
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdnet.model.config import MDNetConfig, preset
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.weights.stable_diffusion import LDM_UNET_EMA, context_dim_of, open_encoder, take_encoder
from mdnet_engines.errors import MDNetError

CONFIG = preset("demo")
STEM = "diffusion_pytorch_model"


class Stock:
    """A whole stock pipeline whose weights are exact in fp16, so that every file variant holds the same numbers."""

    def __init__(self, config: MDNetConfig = CONFIG) -> None:
        torch.manual_seed(3)
        self.unet, self.vae = stock.unet(config).eval(), stock.vae(config).eval()
        with torch.no_grad():
            for parameter in (*self.unet.parameters(), *self.vae.parameters()):
                parameter.add_(torch.randn_like(parameter) * 0.05)  # no two norms alike
                parameter.copy_(parameter.half())

    def save(self, root: Path, half: bool = False, **how: Any) -> Path:
        for part, model in (("unet", self.unet), ("vae", self.vae)):
            (model.half() if half else model).save_pretrained(root / part, **how)
            model.float()
        (root / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        return root

    def compvis(self) -> dict[str, Tensor]:
        keys = {**published.ldm_unet(self.unet.state_dict(), CONFIG), **published.ldm_vae(self.vae.state_dict())}
        return {name: tensor.contiguous() for name, tensor in keys.items()}


@pytest.fixture(scope="module")
def pipeline() -> Stock:
    return Stock()


@pytest.fixture
def folder(pipeline: Stock, tmp_path: Path) -> Path:
    return pipeline.save(tmp_path / "sd")


def imported(source: Path, config: MDNetConfig) -> DiffusionEncoder:
    encoder = DiffusionEncoder(config)
    state = take_encoder(open_encoder(source, config), config)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    encoder.load_state_dict({**state, "context": torch.randn(config.context_length, config.context_dim)})
    return encoder


def check_features(source: Path, pipeline: Stock, config: MDNetConfig = CONFIG) -> None:
    torch.manual_seed(4)
    encoder = imported(source, config)
    image = torch.randint(0, 256, (1, config.image_size, config.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = stock.features(pipeline.vae, pipeline.unet, encoder.context, config.timestep, image)
        got = encoder(image)
    assert set(got) == set(expected)
    for name, feature in got.items():
        # The contract's bound: float32 rounding through some sixty layers. The weights are the same to the bit.
        assert (feature - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


VARIANTS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "fp16": {"half": True, "variant": "fp16"},
    "sharded": {"max_shard_size": "400KB"},
    "sharded fp16": {"half": True, "variant": "fp16", "max_shard_size": "400KB"},
    "bin": {"safe_serialization": False},
    "sharded fp16 bin": {
        "half": True,
        "variant": "fp16",
        "safe_serialization": False,
        "max_shard_size": "400KB",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_folder_gives_stock_features(variant: str, pipeline: Stock, tmp_path: Path) -> None:
    check_features(pipeline.save(tmp_path / "sd", **VARIANTS[variant]), pipeline)


def test_a_bin_of_before_pytorch_1_6_gives_stock_features(pipeline: Stock, folder: Path) -> None:
    for part in ("unet", "vae"):
        file = folder / part / f"{STEM}.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"), _use_new_zipfile_serialization=False)
        file.unlink()
    check_features(folder, pipeline)


def test_the_published_vaes_older_attention_names_are_understood(pipeline: Stock, folder: Path) -> None:
    """stable-diffusion-v1-5's VAE is older than to_q; diffusers' own loader renames it the same way."""
    file = folder / "vae" / f"{STEM}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for new, was in old.items():
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{was}."): t for name, t in state.items()}
    assert "encoder.mid_block.attentions.0.query.weight" in state
    save_file(state, file)
    check_features(folder, pipeline)


def test_float32_goes_before_fp16(pipeline: Stock, folder: Path) -> None:
    for part in ("unet", "vae"):
        (folder / part / f"{STEM}.fp16.safetensors").write_bytes(b"never opened")
    check_features(folder, pipeline)


class LightningCallback:
    """What PyTorch Lightning left in CompVis' checkpoints: a class, by name."""

    __module__, __qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_compvis_file_gives_stock_features(
    suffix: str, pipeline: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"v1-5-pruned-emaonly.{suffix}"
    if suffix == "safetensors":
        save_file(pipeline.compvis(), file)
    else:
        module = types.ModuleType(LightningCallback.__module__)
        module.ModelCheckpoint = LightningCallback  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, LightningCallback.__module__, module)
            state = {"state_dict": pipeline.compvis(), "global_step": 840000, "callbacks": {LightningCallback: {}}}
            torch.save(state, file)
        assert LightningCallback.__module__ not in sys.modules
    check_features(file, pipeline)


def test_averaged_weights_of_a_compvis_file_are_preferred(pipeline: Stock, tmp_path: Path) -> None:
    """diffusers' stable-diffusion-v1-5/unet holds the averages."""
    state = pipeline.compvis()
    for name in [name for name in state if name.startswith("model.diffusion_model.")]:
        state[LDM_UNET_EMA + name.removeprefix("model.").replace(".", "")] = state[name]
        state[name] = torch.zeros_like(state[name])
    save_file(state, tmp_path / "v1-5-pruned.safetensors")
    check_features(tmp_path / "v1-5-pruned.safetensors", pipeline)


def test_decoders_are_never_read(pipeline: Stock, tmp_path: Path) -> None:
    for source in (pipeline.save(tmp_path / "sd"), tmp_path / "sd.safetensors"):
        if source.suffix:
            save_file(pipeline.compvis(), source)
        names = set(open_encoder(source, CONFIG).tensors)
        assert names == set(DiffusionEncoder(CONFIG).state_dict()) - {"context"}


SD21 = stock.SMALL["sd21"]


@pytest.mark.parametrize("source", ["sd", "v2-1_512-ema-pruned.safetensors"])
def test_stable_diffusion_2_gives_stock_features(source: str, tmp_path: Path) -> None:
    pipeline = Stock(SD21)
    if source == "sd":
        pipeline.save(tmp_path / source)
    else:  # what else Stability's file has beside the networks
        schedule = dict.fromkeys(("betas", "alphas_cumprod", "sqrt_recip_alphas_cumprod"), torch.ones(1000))
        save_file({**pipeline.compvis(), **{k: v.clone() for k, v in schedule.items()}}, tmp_path / source)
    assert context_dim_of(tmp_path / source) == SD21.context_dim
    check_features(tmp_path / source, pipeline, SD21)


# What is wrong, and what the message must say about it.


def edit_config(part: str, **fields: Any) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        file = root / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def edit_weights(part: str, edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = root / part / f"{STEM}.safetensors"
        state = load_file(file)
        edit(state)
        save_file(state, file)

    return apply


def remove(part: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (root / part).rename(root.parent / "elsewhere")

    return apply


def cut(part: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        file = root / part
        file.write_bytes(file.read_bytes()[:-1000])

    return apply


def write(part: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: void((root / part).write_bytes(content))


def void(_: object) -> None:
    return None


def only_the_index(root: Path) -> None:
    for part in ("unet", "vae"):
        (root / part).rename(root.parent / part)


def shard_outside(root: Path) -> None:
    (root / "unet" / f"{STEM}.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../vae/x.safetensors"}}
    (root / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(root: Path) -> None:
    (root / "unet" / f"{STEM}.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "gone.safetensors"}}
    (root / "unet" / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))


UNET = f"unet/{STEM}.safetensors"
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "another width": (
        edit_config("unet", block_out_channels=[320, 640, 1280, 1280]),
        r"unet/config.json: block_out_channels is \[320, 640, 1280, 1280\], preset demo expects \[32, 48, 64, 64\]",
    ),
    "layers": (edit_config("unet", layers_per_block=2), "layers_per_block is 2, preset demo expects 1"),
    "heads": (edit_config("unet", attention_head_dim=[5, 10]), r"attention_head_dim is \[5, 10\], .* expects 2"),
    "context": (edit_config("unet", cross_attention_dim=1024), "cross_attention_dim is 1024, .* expects 32"),
    "inpainting": (edit_config("unet", in_channels=9), "in_channels is 9, preset demo expects 4"),
    "linear projection": (edit_config("unet", use_linear_projection=True), "use_linear_projection is True, .* False"),
    "another model": (edit_config("unet", _class_name="ControlNetModel"), "_class_name is ControlNetModel, .* UNet2D"),
    "latents": (
        edit_config("vae", latent_channels=16),
        "vae/config.json: latent_channels is 16, preset demo expects 4",
    ),
    "scaling": (edit_config("vae", scaling_factor=0.13025), "scaling_factor is 0.13025, preset demo expects 0.18215"),
    "groups": (edit_config("vae", norm_num_groups=32), "vae/config.json: norm_num_groups is 32, .* expects 8"),
    "no configuration": (remove("unet/config.json"), f"unet has no config.json; it holds {STEM}.safetensors"),
    "cut configuration": (write("vae/config.json", b'{"a'), "vae/config.json is not JSON"),
    "only the index": (
        only_the_index,
        "holds model_index.json; expected a diffusers pipeline with unet/ and vae/",
    ),
    "no VAE": (remove("vae"), "holds model_index.json, unet/; expected a diffusers pipeline with unet/ and vae/"),
    "no weights": (remove(UNET), rf"unet holds config.json; expected {STEM}.safetensors"),
    "cut weights": (cut(UNET), rf"{STEM}.safetensors is not a complete safetensors file"),
    "empty weights": (write(UNET, b""), rf"{STEM}.safetensors is not a complete safetensors file"),
    "LFS": (write(UNET, b"version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer.*git lfs pull"),
    "shard missing": (shard_missing, "unet lacks the shard gone.safetensors"),
    "shard outside": (shard_outside, "names the shard '../vae/x.safetensors', which is not in its own folder"),
    "missing key": (
        edit_weights("unet", lambda state: state.pop("conv_in.weight")),
        "sd does not fit Stable Diffusion's encoder in preset demo: missing unet.conv_in.weight$",
    ),
    "unexpected key": (
        edit_weights("vae", lambda state: state.update({"encoder.extra": torch.ones(1)})),
        "unexpected vae.encoder.extra$",
    ),
    "shape": (
        edit_weights("unet", lambda state: state.update({"conv_in.weight": torch.ones(32, 9, 3, 3)})),
        r"unet.conv_in.weight is \(32, 9, 3, 3\), expected \(32, 4, 3, 3\)$",
    ),
    "many": (
        edit_weights("unet", lambda state: [state.pop(name) for name in list(state) if "mid_block.resnets" in name]),
        r"(missing unet.mid_block.resnets.*; ){5}and \d+ more$",
    ),
    "not a number": (
        edit_weights("unet", lambda state: state["conv_in.bias"].fill_(float("nan"))),
        "unet.conv_in.bias holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_explained_on_one_line(case: str, folder: Path) -> None:
    break_it, message = WRONG[case]
    break_it(folder)
    with pytest.raises(MDNetError, match=message) as caught:
        take_encoder(open_encoder(folder, CONFIG), CONFIG)
    assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.proof),)


def single_files(tmp_path: Path) -> dict[str, tuple[Callable[[Path], object], str]]:
    return {
        "LoRA": (
            lambda file: save_file({"lora_unet_mid_block.lora_down.weight": torch.ones(1)}, file),
            r"holds a LoRA.*expected Stable Diffusion in one file, with model.diffusion_model.\*",
        ),
        "one part": (
            lambda file: save_file({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, file),
            "one part of a diffusers pipeline",
        ),
        "another model": (
            lambda file: save_file({"a.b": torch.ones(1), "c": torch.ones(1), "d": torch.ones(1)}, file),
            "holds 3 tensors such as a.b, c; expected",
        ),
        "no file": (lambda file: None, "no such file or folder"),
        "text": (lambda file: file.write_text("<html>404</html>"), "is not a file of weights, or was cut short"),
        "evil": (
            lambda file: torch.save({"state_dict": Evil(tmp_path / "proof")}, file),
            r"wants to run \S+\.mkdir; refused",
        ),
        "evil, old format": (
            lambda file: torch.save(Evil(tmp_path / "proof"), file, _use_new_zipfile_serialization=False),
            r"wants to run \S+\.mkdir; refused",
        ),
        "bare pickle": (
            lambda file: file.write_bytes(pickle.dumps({"a": 1}, protocol=2)),
            "is not a file of weights, or was cut short",
        ),
        "no tensors": (lambda file: torch.save({"state_dict": {}}, file), "holds no state dict"),
    }


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("case", list(single_files(Path())))
def test_a_wrong_file_is_explained_on_one_line(case: str, suffix: str, tmp_path: Path) -> None:
    make, message = single_files(tmp_path)[case]
    file = tmp_path / f"model.{suffix}"
    make(file)
    if case in ("evil", "evil, old format", "text", "bare pickle", "no tensors") and suffix == "safetensors":
        message = "is not a complete safetensors file"
    with pytest.raises(MDNetError, match=message) as caught:
        open_encoder(file, CONFIG)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "proof").exists()


def test_evil_would_act_if_it_were_unpickled(tmp_path: Path) -> None:
    """Guards the test above."""
    torch.save(Evil(tmp_path / "proof"), tmp_path / "file")
    torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "proof").is_dir()


def test_a_cut_ckpt_is_explained(pipeline: Stock, tmp_path: Path) -> None:
    file = tmp_path / "cut.ckpt"
    torch.save({"state_dict": pipeline.compvis()}, file)
    cut("cut.ckpt")(tmp_path)
    with pytest.raises(MDNetError, match=r"cut\.ckpt is not a file of weights, or was cut short"):
        open_encoder(file, CONFIG)


def test_stable_diffusion_2_for_a_preset_of_1_names_what_differs(tmp_path: Path) -> None:
    pipeline = Stock(SD21)
    message = r"unet/config.json: attention_head_dim is \[2, 3, 4, 4\], preset demo expects 2"
    with pytest.raises(MDNetError, match=message):
        open_encoder(pipeline.save(tmp_path / "sd"), CONFIG)
    save_file(pipeline.compvis(), tmp_path / "v2.safetensors")
    message = r"to_k.weight is \(32, 64\), expected \(32, 32\)"
    with pytest.raises(MDNetError, match=message):
        take_encoder(open_encoder(tmp_path / "v2.safetensors", CONFIG), CONFIG)
