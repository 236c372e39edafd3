"""Other views of a training image: that they show the same face, and that training and its cache take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mdnet.data.rated import Rated
from mdnet.data.source import open_data
from mdnet.model.config import TrainConfig, preset
from mdnet.model.net import MDNet, random_mdnet
from mdnet.training.features import cached_features
from mdnet.training.prior import draw_faces
from mdnet.training.train import train
from mdnet.training.views import jittered


@pytest.fixture
def model() -> MDNet:
    return random_mdnet(preset("demo"), 0)


@pytest.fixture
def rated(faces: Path) -> Rated:
    data = open_data(faces)
    return data.splits(data.protocol(None, training=True))[0].train


def test_a_view_shows_the_same_face_elsewhere() -> None:
    images = draw_faces(70, 64)
    views = jittered(images, 1)
    assert (views.dtype, views.shape) == (torch.uint8, images.shape)
    grey, seen = images.float().mean(-1).flatten(1), views.float().mean(-1).flatten(1)
    likeness = torch.tensor([[torch.corrcoef(torch.stack([a, b]))[0, 1] for b in seen[:8]] for a in grey[:8]])
    assert likeness.diagonal().min() > 0.7
    assert not (views == images).flatten(1).all(dim=1).any()


def test_a_view_is_the_same_each_time_and_another_for_another_seed() -> None:
    images = draw_faces(66, 64)
    assert torch.equal(jittered(images, 1), jittered(images, 1))
    assert not torch.equal(jittered(images, 1), jittered(images, 2))
    assert not torch.equal(
        jittered(images[:1].expand(2, -1, -1, -1), 1)[0], jittered(images[:1].expand(2, -1, -1, -1), 1)[1]
    )


def test_the_cache_gives_each_view_its_own_features_and_its_images_rating(
    model: MDNet, rated: Rated, tmp_path: Path
) -> None:
    with cached_features(model.diffusion, model.config, rated, folder=tmp_path, views=2) as features:
        count = len(features)
        assert count == len(rated.images)
        rows = torch.tensor([3, 3 + count])
        maps, pixels, ratings = features.batch(rows, torch.zeros(2, dtype=torch.int64))
    assert ratings[0] == ratings[1] == float(rated.ratings[3])
    assert torch.equal(pixels[1], jittered(features.pixels[:count], 1)[3])
    with torch.inference_mode():
        expected = model.diffusion(pixels)
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-4, atol=1e-4)


def test_training_takes_other_views_and_is_judged_by_the_images_themselves(
    model: MDNet, rated: Rated, tmp_path: Path
) -> None:
    results = {}
    for views in (1, 3):
        model = random_mdnet(preset("demo"), 0)
        config = TrainConfig(epochs=1, batch_size=16, views=views, learning_rate=1e-9)
        results[views] = train(model, rated, config, cache=tmp_path)
    assert results[1].loss != results[3].loss
    assert results[1].validation_pearson == pytest.approx(results[3].validation_pearson, abs=1e-4)
