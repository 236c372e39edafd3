"""What the options of a build say of calibration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mdnet.model.config import preset
from mdnet_engines.progress import SILENT
from mdnet_export.cli.calibration import choose_calibration
from mdnet_export.model_source import Weights
from mdnet_export.quantise import Calibration

OPTIONS: dict[str, Any] = {
    "calib": None,
    "num_calib": 8,
    "k_centre": False,
    "range_method": "percentile",
    "max_score_drift": None,
    "min_pearson": 0.9997,
    "calib_cache": None,
    "progress": SILENT,
}


def calibration(low: float, high: float, **options: Any) -> Calibration:
    config = replace(preset("demo"), score_min=low, score_max=high)
    chosen = choose_calibration(Weights("random", config, seed=0), "int8", **{**OPTIONS, **options})
    assert chosen is not None
    return chosen


@pytest.mark.parametrize(("low", "high", "drift"), [(1, 5, 0.05), (0, 100, 1.25), (-1, 1, 0.025)])
def test_the_default_budget_is_in_proportion_to_the_scale(low: float, high: float, drift: float) -> None:
    chosen = calibration(low, high)
    assert chosen.budget.max_score_drift == pytest.approx(drift)
    assert chosen.budget.min_pearson == 0.9997
    assert (chosen.scale.minimum, chosen.scale.maximum) == (low, high)


def test_a_budget_that_was_given_is_in_the_scales_own_points() -> None:
    assert calibration(0, 100, max_score_drift=0.5).budget.max_score_drift == 0.5
