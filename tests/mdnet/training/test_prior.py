"""The demo's latent diffusion model: that it learns, that its encoder arrives whole, and that ratings have no part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import stock_diffusion
import torch
from click.testing import CliRunner
from PIL import Image

from mdnet.cli.main import main
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, read_metadata
from mdnet.model.config import preset
from mdnet.model.net import MDNet, random_mdnet
from mdnet.training import prior
from mdnet.training.prior import LatentDiffusion, PriorConfig, draw_faces, reconstruct, sample, train_prior

CONFIG = PriorConfig(vae_epochs=6, vae_batch=8, unet_epochs=10, unet_batch=8, ema=0.8)


@pytest.fixture(scope="module")
def trained() -> tuple[MDNet, LatentDiffusion, dict[str, list[float]], dict[str, torch.Tensor]]:
    model = random_mdnet(preset("demo"), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses: dict[str, list[float]] = {"VAE": [], "U-Net": []}
    diffusion = train_prior(
        model, draw_faces(24, 128), CONFIG, on_epoch=lambda stage, _, loss: losses[stage].append(loss)
    )
    return model, diffusion, losses, before


Trained = tuple[MDNet, LatentDiffusion, dict[str, list[float]], dict[str, torch.Tensor]]


def test_both_stages_learn(trained: Trained) -> None:
    _, _, losses, _ = trained
    assert [len(losses[stage]) for stage in ("VAE", "U-Net")] == [6, 10]
    assert losses["VAE"][-1] < 0.8 * losses["VAE"][0]
    assert losses["U-Net"][-1] < 0.9 * losses["U-Net"][0]


def test_the_frozen_encoder_is_that_of_the_diffusion_model_and_nothing_else_changed(trained: Trained) -> None:
    model, diffusion, _, before = trained
    image = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
    with torch.no_grad():
        ours = model.diffusion(image)
        stock = stock_diffusion.features(diffusion.vae, diffusion.unet, diffusion.context, 1, image)
    for name, expected in stock.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)  # the same modules, other batching
    assert not any(parameter.requires_grad for parameter in model.diffusion.parameters())
    for name, value in model.state_dict().items():
        if not name.startswith("diffusion.") or name == "diffusion.context":
            assert torch.equal(value, before[name]), name


def test_latents_have_unit_variance_at_the_presets_scaling_and_decoding_undoes_it(trained: Trained) -> None:
    model, diffusion, _, _ = trained
    faces = draw_faces(24, 128)
    with torch.no_grad():
        latents = model.diffusion.vae(prior.to_vae_range(torch.cat([faces, faces.flip(2)])))
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    # A second normalisation changes neither what is decoded nor, being at 1 already, the latents.
    with torch.no_grad():
        before = reconstruct(diffusion, faces[:2])
        prior._normalise(
            diffusion.vae,
            prior._latents(diffusion.vae, faces) * 0 + 3.0 * torch.randn(24, 2, 4, 16, 16),
            model.config.vae_scaling,
        )
        after = reconstruct(diffusion, faces[:2])
    assert (before.int() - after.int()).abs().max() <= 1  # rounding to 8 bits


def test_samples_are_pictures_repeatable_by_their_seed(trained: Trained) -> None:
    _, diffusion, _, _ = trained
    first, again = (sample(diffusion, 2, steps=4, seed=1) for _ in range(2))
    other = sample(diffusion, 2, steps=4, seed=2)
    assert first.shape == (2, 128, 128, 3)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_is_reproducible() -> None:
    config = PriorConfig(vae_epochs=1, unet_epochs=1)
    states = []
    for _ in range(2):
        model = random_mdnet(preset("demo"), 0)
        train_prior(model, draw_faces(4, 128), config)
        states.append(model.diffusion.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_prior_command_writes_a_checkpoint_to_train_from_and_a_picture(tmp_path: Path) -> None:
    file, picture = tmp_path / "prior.safetensors", tmp_path / "faces.png"
    words = ["prior", "--faces", "4", "--vae-epochs", "1", "--unet-epochs", "1", "--picture", picture, "-o", file]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(file).config == preset("demo")
    with Image.open(picture) as shown:
        assert shown.size == (4 * 128, 3 * 128)
        rows = np.asarray(shown).reshape(3, 128, 4, 128, 3)
    assert not np.array_equal(rows[0], rows[1])


def test_prior_learns_from_a_tables_training_list_and_no_drawn_faces(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "prior.safetensors"
    words = ["prior", "--data", faces, "--face", "none", "--vae-epochs", "1", "--unet-epochs", "1", "-o", file]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    listed = (faces / "train_test_files" / "split_of_60%training and 40%testing" / "train.txt").read_text()
    count = len(listed.splitlines())
    assert read_metadata(file)[1]["encoder"] == f"trained here on {count} pictures of {faces.name}, without ratings"


def test_prior_without_faces_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["prior", "--faces", "0", "-o", str(tmp_path / "prior.safetensors")])
    assert result.exit_code == 2
    assert "0 faces to learn from; expected 2 or more" in result.stderr


def test_the_packaged_demo_is_of_the_preset() -> None:
    assert load_checkpoint(demo_checkpoint()).config == preset("demo")
    assert demo_checkpoint().stat().st_size < 5e6
