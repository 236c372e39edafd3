"""The linear probe: that the heads are the regression, what it chooses by, and that training begins there."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mdnet.data.rated import Rated
from mdnet.data.source import open_data
from mdnet.model.config import TrainConfig, preset
from mdnet.model.net import MDNet, random_mdnet, with_fusion
from mdnet.training.features import Features, cached_features
from mdnet.training.probe import _chosen, _ridge, fit_stream_heads
from mdnet.training.train import Epoch, score_features, train
from mdnet_engines.errors import UsageError


@pytest.fixture(scope="module")
def rated(faces: Path) -> Rated:
    data = open_data(faces)
    return data.splits(data.protocol(None, training=True))[0].train


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


def features_of(model: MDNet, rated: Rated, cache: Path) -> Features:
    with cached_features(model.diffusion, model.config, rated, folder=cache) as features:
        return features


def wide(fusion: str = "cross-attention", **changes: int) -> MDNet:
    """The demo with as many maps as a stream's tokens have channels: any matrix of weights fits."""
    return with_fusion(
        random_mdnet(dataclasses.replace(preset("demo"), **{"stream_heads": 48, **changes}), 0), fusion, 0
    )


def test_scores_are_those_of_a_ridge_regression_on_all_tokens(rated: Rated, cache: Path) -> None:
    model = wide()
    features, rows = features_of(model, rated, cache), torch.arange(len(rated.images))
    error = fit_stream_heads(model, features, rows, views=1, seed=0)
    assert 0 < error < np.var(rated.ratings)
    scores = score_features(model, features, rows, 16)
    both = [*scores, *_mirrored(model, features, rows)]
    assert np.mean((both - np.tile(rated.ratings, 2)) ** 2) == pytest.approx(error, rel=1e-3)


@torch.inference_mode()
def _mirrored(model: MDNet, features: Features, rows: torch.Tensor) -> np.ndarray:
    maps, pixels, _ = features.batch(rows, torch.ones_like(rows))
    return model.fusion(maps, model.vim(pixels)).numpy()


@pytest.mark.parametrize("fusion", ["vim-only", "diffusion-only", "concatenation"])
def test_every_kind_of_fusion_has_a_probe_of_the_streams_it_reads(fusion: str, rated: Rated, cache: Path) -> None:
    model = wide(fusion)
    rows = torch.arange(len(rated.images))
    assert fit_stream_heads(model, features_of(model, rated, cache), rows, views=1, seed=0) < np.var(rated.ratings)


def test_fewer_maps_keep_the_largest_part_of_the_weights(rated: Rated, cache: Path) -> None:
    rows = torch.arange(len(rated.images))
    scores = {}
    for maps in (1, 16, 48):
        model = wide(stream_heads=maps)
        features = features_of(model, rated, cache)
        error = fit_stream_heads(model, features, rows, views=1, seed=0)
        scores[maps] = score_features(model, features, rows, 16)
        both = [*scores[maps], *_mirrored(model, features, rows)]
        assert np.mean((both - np.tile(rated.ratings, 2)) ** 2) == pytest.approx(error, rel=1e-3)
    far, near = (np.abs(scores[maps] - scores[48]).mean() for maps in (1, 16))
    assert near < far


def test_a_model_without_heads_is_refused(rated: Rated, cache: Path) -> None:
    model = random_mdnet(dataclasses.replace(preset("demo"), stream_heads=0), 0)
    with pytest.raises(UsageError, match="this model has none"):
        fit_stream_heads(model, features_of(model, rated, cache), torch.arange(4), views=1, seed=0)


@pytest.mark.parametrize("shape", [(400, 12), (60, 300)])  # more rows than columns, and fewer
def test_the_ridge_finds_the_weights_and_its_penalty_grows_with_the_noise(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    true = torch.zeros(shape[1])
    true[:3] = torch.tensor([1.0, -2.0, 0.5])
    held_out = torch.arange(shape[0]) % 4 == 0
    clean, level = _ridge(x, 3 + x @ true, held_out=held_out)
    noisy, _ = _ridge(x, 3 + x @ true + 20 * torch.randn(shape[0], generator=generator), held_out=held_out)
    assert level == pytest.approx(float((3 + x @ true).mean()), abs=1e-4)
    assert torch.corrcoef(torch.stack([clean, true]))[0, 1] > 0.4
    if shape[0] > shape[1]:
        torch.testing.assert_close(clean, true, atol=0.02, rtol=0)
        assert noisy.norm() < (torch.linalg.lstsq(x - x.mean(0), x @ true).solution).norm() * 3


def test_views_are_chosen_without_repetition_and_all_where_they_fit() -> None:
    images = torch.tensor([2, 5, 7])
    image, rows, mirror = _chosen(images, 10, views=2, count=100, generator=torch.Generator().manual_seed(0))
    assert sorted(zip(rows.tolist(), mirror.tolist(), strict=True)) == sorted(
        (row + 10 * view, side) for row in (2, 5, 7) for view in (0, 1) for side in (0, 1)
    )
    assert torch.equal(images[image], rows % 10)
    few, _, _ = _chosen(images, 10, views=2, count=2, generator=torch.Generator().manual_seed(0))
    assert len(few) == len(set(few.tolist())) == 2


def test_training_begins_at_the_probe_and_keeps_it_where_nothing_is_better(rated: Rated, cache: Path) -> None:
    epochs: list[Epoch] = []
    model = random_mdnet(preset("demo"), 0)
    config = TrainConfig(epochs=2, batch_size=18, linear_probe=True, learning_rate=1e-9)
    best = train(model, rated, config, cache=cache, on_epoch=epochs.append)
    assert [epoch.number for epoch in epochs] == [0, 1, 2]
    assert epochs[1].validation_pearson == pytest.approx(epochs[0].validation_pearson, abs=1e-3)
    assert best.validation_pearson == max(epoch.validation_pearson for epoch in epochs)


def test_no_epochs_leave_the_probe_of_all_pictures(rated: Rated, cache: Path) -> None:
    probed, trained = wide(), wide()
    rows = torch.arange(len(rated.images))
    error = fit_stream_heads(probed, features_of(probed, rated, cache), rows, views=1, seed=3)
    best = train(trained, rated, TrainConfig(epochs=0, linear_probe=True, seed=3), cache=cache)
    assert (best.number, best.loss) == (0, error)
    features = features_of(trained, rated, cache)
    np.testing.assert_array_equal(*(score_features(model, features, rows, 16) for model in (probed, trained)))


def test_no_epochs_and_no_probe_train_nothing() -> None:
    with pytest.raises(UsageError, match="add --linear-probe"):
        TrainConfig(epochs=0)
