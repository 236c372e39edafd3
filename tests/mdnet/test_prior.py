"""The demo's encoder: what it is taught, that it learns, and that ratings have no part in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner

from mdnet.checkpoint import demo_checkpoint, load_checkpoint
from mdnet.cli import main
from mdnet.config import preset
from mdnet.faces import draw_factors
from mdnet.model import random_mdnet
from mdnet.prior import targets, train_prior


def test_every_target_is_a_number_and_a_symmetric_face_is_not_displaced() -> None:
    face = draw_factors(np.random.default_rng(0))
    even = dataclasses.replace(face, symmetry=1.0, proportions=1.0)
    assert np.isfinite(targets(face)).all()
    count = len(face.lopsided) + len(face.off_canon)
    assert any(targets(face)[:count])
    assert not any(targets(even)[: 2 * count])


def test_training_reduces_the_error_and_freezes_the_encoder_again() -> None:
    model = random_mdnet(preset("demo"), 0)
    rest = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("diffusion.")}
    errors: list[float] = []
    train_prior(model, faces=16, epochs=10, batch_size=8, on_epoch=lambda _, error: errors.append(error))
    assert errors[-1] < 0.8 * errors[0]
    assert not any(parameter.requires_grad for parameter in model.diffusion.parameters())
    assert all(torch.equal(value, rest[name]) for name, value in model.state_dict().items() if name in rest)


def test_prior_command_writes_a_checkpoint_to_train_from(tmp_path: Path) -> None:
    file = tmp_path / "prior.safetensors"
    result = CliRunner().invoke(main, ["prior", "--faces", "8", "--epochs", "1", "-o", str(file)])
    assert result.exit_code == 0, result.stderr
    assert load_checkpoint(file).config == preset("demo")


def test_the_packaged_demo_is_of_the_preset() -> None:
    assert load_checkpoint(demo_checkpoint()).config == preset("demo")
    assert demo_checkpoint().stat().st_size < 5e6
