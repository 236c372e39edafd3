"""MD-Net as a whole: configuration, fusion, checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdnet.model.checkpoint import (
    CONFIG_KEY,
    NOTES_KEY,
    demo_checkpoint,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from mdnet.model.config import PRESETS, MDNetConfig, preset
from mdnet.model.fusion import sine_positions
from mdnet.model.net import MDNet, random_mdnet, with_scale
from mdnet_engines.errors import MDNetError, UsageError


@pytest.fixture(scope="module")
def model() -> MDNet:
    return random_mdnet(preset("demo"), seed=3)


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 128, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_scores_are_on_the_scale_and_differ(model: MDNet) -> None:
    with torch.no_grad():
        scores = model(images(4))
    assert scores.shape == (4,)
    assert ((scores > 1) & (scores < 5)).all()
    assert len(scores.unique()) == 4


def test_another_scale_moves_the_scores_and_goes_with_the_checkpoint(model: MDNet, tmp_path: Path) -> None:
    with torch.no_grad():
        share = (model(images(4)) - 1) / 4
        changed = with_scale(random_mdnet(preset("demo"), seed=3), -10, 110)
        torch.testing.assert_close(changed(images(4)), -10 + 120 * share)
        save_checkpoint(changed, tmp_path / "c.safetensors")
        kept = load_checkpoint(tmp_path / "c.safetensors")
        torch.testing.assert_close(kept(images(4)), changed(images(4)))
    assert (kept.config.score_min, kept.config.score_max) == (-10, 110)


def test_a_batch_scores_as_its_images_do(model: MDNet) -> None:
    batch = images(3)
    with torch.no_grad():
        singles = torch.cat([model(image[None]) for image in batch])
        torch.testing.assert_close(model(batch), singles, rtol=0, atol=1e-5)  # other matrix shapes, other rounding


@pytest.mark.parametrize("name", ["down_s16", "down_s32", "mid_s64"])
def test_every_scale_reaches_the_score(model: MDNet, name: str) -> None:
    image = images(1)
    with torch.no_grad():
        features, tokens = model.diffusion(image), model.vim(image)
        before = model.fusion(features, tokens)
        features[name] = features[name].flip(1)
        assert not torch.allclose(model.fusion(features, tokens), before, atol=1e-6)


def test_every_vim_token_reaches_the_score(model: MDNet) -> None:
    image = images(1)
    features, tokens = model.diffusion(image), model.vim(image).detach().requires_grad_()
    model.fusion(features, tokens).sum().backward()
    assert (tokens.grad.abs().sum(-1) > 0).all()


def test_training_touches_vim_and_fusion_only(model: MDNet) -> None:
    trainable = {id(parameter) for parameter in model.trainable_parameters()}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in trainable) == (not name.startswith("diffusion."))


def test_positions_tell_every_place_apart() -> None:
    positions = sine_positions(16, 64)
    distances = torch.cdist(positions, positions) + torch.eye(256) * 9
    assert distances.min() > 0.1


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = (random_mdnet(preset("demo"), seed=7).state_dict() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_checkpoint_gives_the_model_back(model: MDNet, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_checkpoint(model, file, notes={"pearson": 0.5})
    loaded = load_checkpoint(file)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        # Where a weight lies in the mapped file decides how a product rounds.
        torch.testing.assert_close(loaded(images(2)), model(images(2)), rtol=0, atol=1e-6)
    assert read_metadata(file) == (model.config, {"pearson": 0.5})
    assert len(loaded.trainable_parameters()) == len(model.trainable_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(model: MDNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")

    def full_disk(_tensors: object, target: str, _metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mdnet.model.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(model, file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_bytes() == b"old"


def test_a_checkpoint_of_another_preset_is_refused() -> None:
    with pytest.raises(MDNetError, match="preset demo, not sd15-vim-s"):
        load_checkpoint(demo_checkpoint(), expect_preset="sd15-vim-s")


def test_keys_that_do_not_fit_are_named(model: MDNet, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_checkpoint(model, file)
    tensors = load_file(file)
    tensors["vim.extra"] = torch.zeros(1)
    tensors["vim.cls_token"] = torch.zeros(1, 1, 7)
    del tensors["fusion.head.out.bias"]
    save_file(tensors, file, {CONFIG_KEY: json.dumps(model.config.to_dict())})
    with pytest.raises(MDNetError) as error:
        load_checkpoint(file)
    for part in ("missing fusion.head.out.bias", "unexpected vim.extra", "vim.cls_token is (1, 1, 7)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "not a safetensors"), (b"\x00" * 64, "not a safetensors"), (None, "no such file")]
)
def test_a_file_that_is_no_checkpoint_is_explained(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MDNetError, match=reason):
        load_checkpoint(file)


def test_another_models_safetensors_is_explained(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(MDNetError, match="no MD-Net configuration"):
        read_metadata(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", PRESETS)
def test_configuration_survives_json(name: str) -> None:
    config = preset(name)
    assert MDNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


NO_SIZE = [-1, 0, 10**18, None, "16", 1.5, math.nan, True, [], {}]
NO_FIELD: dict[str, list[object]] = {
    **dict.fromkeys(("image_size", "vae_layers", "latent_channels", "unet_layers", "context_dim"), NO_SIZE),
    **dict.fromkeys(("context_length", "norm_groups", "vim_dim", "vim_depth", "vim_patch", "vim_stride"), NO_SIZE),
    **dict.fromkeys(("vim_state", "vim_conv", "vim_expand", "fusion_depth", "fusion_heads", "fusion_mlp"), NO_SIZE),
    "head_dim": NO_SIZE,
    "stream_heads": [value for value in NO_SIZE if value != 0],
    "unet_heads": [*NO_SIZE, [2, 2], [2, 2, 2, 0], [2, 2, 2, "2"], [2, 2, 2, 5]],
    "unet_linear_projection": [None, 0, 1, "yes"],
    "face": [0, -1, 0.2, 8.5, math.nan, math.inf, "1", []],
    "vae": [None, 3, "huge"],
    "timestep": [-1, 1000, None, "1", 1.5],
    "vae_scaling": [0, -1, math.nan, math.inf, None, "1"],
    "score_min": [math.nan, -math.inf, None, "1", 6],
    "score_max": [math.nan, math.inf, None, "5", 1],
    "vae_channels": [None, "8", [8, 16, 24], [8, 16, 24, -1], [8, 16, 24, "32"], [8, 16, 24, 33], 8],
    "unet_channels": [None, [32, 48, 64, 10**18], [32, 48, 64, 64.5], [32, 48, 64, 64, 64]],
    "fusion": [None, 3, "by magic"],
    "preset": [None, 3, "", "line\nbreak"],
}


def test_every_field_of_the_configuration_is_among_those_tried() -> None:
    assert set(NO_FIELD) == {field.name for field in dataclasses.fields(MDNetConfig)}


@pytest.mark.parametrize("name", NO_FIELD)
def test_a_checkpoint_with_a_field_that_cant_be_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    fields = preset("demo").to_dict()
    for value in NO_FIELD[name]:
        file = tmp_path / "model.safetensors"
        save_file({"x": torch.ones(1)}, file, {CONFIG_KEY: json.dumps({**fields, name: value})})
        with pytest.raises(MDNetError, match=rf"model\.safetensors has no usable configuration: .*{name}") as caught:
            load_checkpoint(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000])
@pytest.mark.parametrize("key", [CONFIG_KEY, NOTES_KEY])
def test_a_checkpoint_whose_configuration_or_notes_are_no_json_is_refused(key: str, text: str, tmp_path: Path) -> None:
    metadata = {CONFIG_KEY: json.dumps(preset("demo").to_dict()), NOTES_KEY: "{}", key: text}
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(MDNetError, match=r"its configuration (and|or) notes are no") as caught:
        load_checkpoint(tmp_path / "model.safetensors")
    assert "\n" not in str(caught.value)


def test_the_largest_configuration_that_is_allowed_takes_no_memory_before_its_weights_are_missed(
    tmp_path: Path,
) -> None:
    fields = {**preset("demo").to_dict(), "image_size": 4096, "vim_stride": 1, "vim_dim": 65_536, "head_dim": 65_536}
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors", {CONFIG_KEY: json.dumps(fields)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MDNetError, match="does not fit its own configuration"):
        load_checkpoint(tmp_path / "model.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # KiB; the weights are terabytes


def test_a_checkpoint_of_before_the_variants_loads_as_it_was() -> None:
    fields = {
        name: value
        for name, value in preset("sd15-vim-s").to_dict().items()
        if name not in ("vae", "unet_linear_projection")
    }
    assert MDNetConfig.from_dict(fields) == preset("sd15-vim-s")


def test_configuration_says_what_is_wrong() -> None:
    fields = preset("demo").to_dict()
    with pytest.raises(UsageError, match=r"^unet_heads.2 is 'x': input should be a valid integer$"):
        MDNetConfig.from_dict({**fields, "unet_heads": [2, 2, "x", 2]})
    with pytest.raises(UsageError, match=r"^unet_channels 32, 48, 64, 64 are not multiples of unet_heads 2, 5, 4, 4$"):
        MDNetConfig.from_dict({**fields, "unet_heads": [2, 5, 4, 4]})
    with pytest.raises(UsageError, match=r"^vae_channels are 8, 16, 24, 32; a tiny VAE has one width$"):
        MDNetConfig.from_dict({**fields, "vae": "tiny"})
    with pytest.raises(UsageError, match="vim_colour"):
        MDNetConfig.from_dict({**fields, "vim_colour": 3})
    with pytest.raises(UsageError, match="multiple of 64"):
        dataclasses.replace(preset("demo"), image_size=100)
    with pytest.raises(UsageError, match="sd15-vim-s"):
        preset("sd15")
