"""What costs little, beside every result: each group's mean rating, and a ridge regression on the frozen features.

A model that is not above them has learned nothing of its own from the pictures. They learn from the training list
alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdnet.data.rated import Rated
from mdnet.evaluation.ridge import ridge
from mdnet_engines.parity.metrics import pearson
from mdnet_engines.progress import SILENT, Progress

if TYPE_CHECKING:
    from mdnet.model.net import MDNet

GROUP_MEAN = "mean of the group"
RIDGE = "ridge on the frozen features"
Baselines = dict[str, np.ndarray]
"""Name → predicted ratings of the test images, float64 (n,)."""


def group_mean(train: Rated, test: Rated) -> Baselines:
    """The mean rating of each test image's group in the training list; of the whole list for a group that it lacks.

    Empty without two groups, since equal predictions have no correlation.
    """
    if not len(train) or len({*test.groups}) < 2:
        return {}
    groups = np.array(train.groups)
    means = {group: float(train.ratings[groups == group].mean()) for group in {*train.groups}}
    whole = float(train.ratings.mean())
    return {GROUP_MEAN: np.array([means.get(group, whole) for group in test.groups])}


def frozen_ridge(
    model: MDNet,
    train: Rated,
    tested: np.ndarray,
    *,
    cache: Path,
    half_features: bool = False,
    progress: Progress = SILENT,
) -> Baselines:
    """A ridge on pooled frozen features of `train`; `tested` (n, d) are those of the test images.

    Args:
        cache: where frozen features are kept (see `mdnet.training.features`); what is missing is computed.

    Raises:
        MDNetError: as `mdnet.training.features.cached_features`.
    """
    from mdnet.evaluation.frozen import training_features

    if len(train) < 3:  # two points and a mean leave no error to judge a penalty by
        return {}
    features = training_features(model, train, cache=cache, half=half_features, progress=progress)
    progress.step("fitting the ridge baseline")
    return {RIDGE: ridge(features, train.ratings, tested)}


def beside(ratings: np.ndarray, baselines: Mapping[str, np.ndarray]) -> str:
    """The end of a result's line: what the baselines reach on the same test images; empty without one."""
    return listed({name: f"{pearson(ratings, predicted):.4f}" for name, predicted in baselines.items()})


def listed(figures: Mapping[str, str]) -> str:
    """The baselines' PC as `beside` gives them."""
    if not figures:
        return ""
    return "; baselines: " + ", ".join(f"PC {figure} {name}" for name, figure in figures.items())
