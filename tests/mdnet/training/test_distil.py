"""A tiny VAE encoder learns the latents of a model's own, and takes its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mdnet.cli.main import main
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, origins, read_metadata
from mdnet.model.config import preset
from mdnet.model.net import MDNet
from mdnet.training.distil import DistilConfig, distil, tiny_preset
from mdnet_engines.errors import UsageError

CONFIG = DistilConfig(faces=40, epochs=6, batch=8)


@pytest.fixture(scope="module")
def teacher() -> MDNet:
    return load_checkpoint(demo_checkpoint())


def test_the_encoder_learns_the_latents_of_faces_it_has_not_seen(teacher: MDNet) -> None:
    losses: list[float] = []
    _, share = distil(teacher, CONFIG, on_epoch=lambda _number, loss: losses.append(loss))
    assert len(losses) == CONFIG.epochs
    assert losses[-1] < 0.7 * losses[0]
    assert 0.2 < share < 1  # zeros reach 0, the teacher 1


def test_only_the_vae_changes_and_the_teacher_stays_as_it_was(teacher: MDNet) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made, _ = distil(teacher, DistilConfig(faces=4, epochs=1))
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert teacher.config == preset("demo")
    assert made.config == preset("demo-taesd")
    assert not made.diffusion.training
    assert not any(parameter.requires_grad for parameter in made.diffusion.parameters())
    for name, value in made.state_dict().items():
        assert name.startswith("diffusion.vae.") or torch.equal(value, before[name]), name


def test_distilling_is_reproducible_and_leaves_the_random_state(teacher: MDNet) -> None:
    state = torch.random.get_rng_state()
    one, other = (distil(teacher, DistilConfig(faces=4, epochs=1))[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_tiny_preset_keeps_all_that_is_not_the_vaes() -> None:
    config = dataclasses.replace(preset("sd15-vim-s"), image_size=128, fusion_depth=3)
    tiny = tiny_preset(config)
    assert (tiny.preset, tiny.vae, tiny.image_size, tiny.fusion_depth) == ("sd15-taesd-vim-s", "tiny", 128, 3)
    for without in ("sd21-vim-s", "demo-taesd"):
        with pytest.raises(UsageError, match=f"no preset is {without} with a tiny VAE; those with one: sd15-taesd"):
            tiny_preset(preset(without))


def test_distil_command_writes_a_checkpoint_to_train_from(tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    result = CliRunner().invoke(main, ["distil", "--faces", "4", "--epochs", "1", "-o", str(file)])
    assert result.exit_code == 0, result.stderr
    assert "of the latents' variance on faces it did not learn from" in result.stdout
    assert load_checkpoint(file).config == preset("demo-taesd")
    assert read_metadata(file)[1]["vae"] == "distilled from the packaged demo's, drawn faces"
    # What is made from it goes on saying whose weights are in it.
    assert origins(file) == {**origins(None), "vae": "distilled from the packaged demo's, drawn faces"}
    again = CliRunner().invoke(main, ["distil", "--init", str(file), "-o", str(tmp_path / "again.safetensors")])
    assert again.exit_code == 2
    assert "no preset is demo-taesd with a tiny VAE" in again.stderr
