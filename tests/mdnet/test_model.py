"""MD-Net as a whole: configuration, fusion, checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mdnet.checkpoint import CONFIG_KEY, demo_checkpoint, load_checkpoint, read_metadata, save_checkpoint
from mdnet.config import PRESETS, MDNetConfig, preset
from mdnet.fusion import sine_positions
from mdnet.model import MDNet, random_mdnet
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
    with torch.no_grad():
        assert torch.equal(loaded(images(2)), model(images(2)))
    assert read_metadata(file) == (model.config, {"pearson": 0.5})
    assert len(loaded.trainable_parameters()) == len(model.trainable_parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_save_leaves_the_old_checkpoint(model: MDNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")

    def full_disk(_tensors: object, target: str, _metadata: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mdnet.checkpoint.save_file", full_disk)
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


def test_configuration_says_what_is_wrong() -> None:
    fields = preset("demo").to_dict()
    with pytest.raises(UsageError, match="vim_colour"):
        MDNetConfig.from_dict({**fields, "vim_colour": 3})
    with pytest.raises(UsageError, match="multiple of 64"):
        dataclasses.replace(preset("demo"), image_size=100)
    with pytest.raises(UsageError, match="sd15-vim-s"):
        preset("sd15")
