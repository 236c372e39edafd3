"""Baselines beside every result: what they predict, what they cost, and where they are printed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from scipy import stats

from mdnet.cli.main import main
from mdnet.data.rated import Rated
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.evaluation.baselines import GROUP_MEAN, RIDGE, beside, group_mean
from mdnet.evaluation.evaluate import predict
from mdnet.evaluation.frozen import PoolingScores, pooled, training_features
from mdnet.evaluation.loaded import score_beside_baselines
from mdnet.evaluation.ridge import ridge
from mdnet.evaluation.scored_model import torch_scores
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint
from mdnet_rt.images.preprocess import load_image


def rated(groups: str, ratings: list[float]) -> Rated:
    return Rated([Path(f"{n}.jpg") for n in range(len(groups))], np.array(ratings, np.float32), list(groups))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def test_a_groups_mean_is_of_the_training_list_and_of_all_where_it_lacks_the_group() -> None:
    train, test = rated("aabb", [1, 2, 4, 4]), rated("cab", [5, 5, 5])
    np.testing.assert_allclose(group_mean(train, test)[GROUP_MEAN], [2.75, 1.5, 4])


@pytest.mark.parametrize(("train", "test"), [("ab", "aa"), ("", "ab")])
def test_one_group_or_no_training_list_has_no_mean_to_compare(train: str, test: str) -> None:
    assert group_mean(rated(train, [1.0] * len(train)), rated(test, [1.0] * len(test))) == {}


def test_the_end_of_a_line_names_each_baseline_with_its_correlation() -> None:
    ratings = np.array([1.0, 2, 3])
    assert beside(ratings, {}) == ""
    assert beside(ratings, {"one": ratings, "other": -ratings}) == "; baselines: PC 1.0000 one, PC -1.0000 other"


@torch.no_grad()
def test_pooled_features_are_the_means_of_quarters_and_the_encoder_runs_once(faces: Path, tmp_path: Path) -> None:
    model, (split,) = load_checkpoint(demo_checkpoint()), read_splits(faces, "60-40")
    calls: list[int] = []
    model.diffusion.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    score = PoolingScores(model)
    scores = predict(score, 128, split.test, batch_size=9)
    assert calls == [9, 9, 6]
    np.testing.assert_array_equal(scores, predict(torch_scores(model), 128, split.test, batch_size=9))
    image = torch.from_numpy(load_image(split.test.images[10], 128))[None]
    maps = model.diffusion(image)
    expected = [
        each[0, :, half : half + len(each[0, 0]) // 2, other : other + len(each[0, 0]) // 2].mean(dim=(1, 2))
        for each in maps.values()
        for half in (0, each.shape[2] // 2)
        for other in (0, each.shape[3] // 2)
    ]
    found = np.sort(score.features()[10])
    np.testing.assert_allclose(found, np.sort(torch.cat(expected)), atol=1e-4)
    assert found.shape == (4 * sum(channels for channels, _, _ in model.config.feature_shapes.values()),)
    # From the cache, the training list has them as the test list has while it is scored.
    cached = training_features(model, split.test, cache=tmp_path)
    np.testing.assert_allclose(cached, score.features(), atol=1e-4)


@torch.no_grad()
def test_the_ridge_is_fitted_to_the_training_list_alone(faces: Path, tmp_path: Path) -> None:
    model, (split,) = load_checkpoint(demo_checkpoint()), read_splits(faces, "60-40")
    scores, baselines = score_beside_baselines(model, split, cache=tmp_path)
    train, test = (
        np.concatenate([pooled(model.diffusion(torch.from_numpy(load_image(file, 128))[None])) for file in part.images])
        for part in (split.train, split.test)
    )
    expected = ridge(train, split.train.ratings, test)
    assert list(baselines) == [GROUP_MEAN, RIDGE]
    np.testing.assert_allclose(baselines[RIDGE], expected, atol=1e-2)
    assert np.ptp(scores) > 0


def test_evaluate_prints_baselines_on_the_line_and_keeps_them(faces: Path, tmp_path: Path) -> None:
    file, cache = tmp_path / "r.json", tmp_path / "cache"
    done = run(demo_checkpoint(), "--data", faces, "--cache", cache, "--json", file)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text())
    (split,) = read_splits(faces, "60-40")
    means = {
        group: split.train.ratings[np.array(split.train.groups) == group].mean() for group in {*split.train.groups}
    }
    expected = stats.pearsonr([means[group] for group in split.test.groups], split.test.ratings).statistic
    found = document["splits"][0]["baselines"]
    assert found[GROUP_MEAN]["pearson"] == pytest.approx(expected, abs=1e-5)
    assert found[GROUP_MEAN]["images"] == 24
    line = f"; baselines: PC {expected:.4f} {GROUP_MEAN}, PC {found[RIDGE]['pearson']:.4f} {RIDGE}\n"
    assert done.stdout.endswith(line)
    assert document["baselines"][RIDGE]["mean"] == {name: found[RIDGE][name] for name in ("pearson", "mae", "rmse")}
    assert "no ridge" not in done.stderr
    assert list(cache.glob("*/*.safetensors"))


def test_without_a_cache_the_line_has_the_groups_mean_and_a_note_says_what_is_left_out(faces: Path) -> None:
    done = run(demo_checkpoint(), "--data", faces, "--protocol", "cv5")
    assert done.stderr.splitlines()[-1] == (
        f"note: no {RIDGE} beside it; that takes a checkpoint, a training list and --cache DIR"
    )
    *folds, mean = done.stdout.splitlines()
    figures = [float(re.search(r"baselines: PC (\S+) mean of the group$", line)[1]) for line in folds]  # type: ignore[index]
    assert mean.endswith(f"; baselines: PC {np.mean(figures):.4f} ± {np.std(figures, ddof=1):.4f} {GROUP_MEAN}")


def test_a_list_of_two_leaves_out_the_ridge(tmp_path: Path, faces: Path) -> None:
    from mdnet.evaluation.baselines import frozen_ridge

    (split,) = read_splits(faces, "60-40")
    model = load_checkpoint(demo_checkpoint())
    assert frozen_ridge(model, split.train.take(np.arange(2)), np.zeros((1, 4)), cache=tmp_path) == {}
