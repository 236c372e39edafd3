"""Histograms of magnitudes, and the ranges made of them, against NumPy on the raw values."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from recorded import Recorded

from mdnet_calib.calibration_set import RangeMethod
from mdnet_calib.ranges import BINS, Histogram, collect, largest_magnitudes
from mdnet_engines.errors import MDNetError

RANDOM = np.random.default_rng(0)
DISTRIBUTIONS = {
    "normal": RANDOM.normal(size=100_000),
    "uniform": RANDOM.uniform(-3, 3, 100_000),
    "laplace": RANDOM.laplace(size=100_000),
    "student": RANDOM.standard_t(3, 100_000),
    "negative": -RANDOM.exponential(size=100_000),
    "rectified": np.maximum(RANDOM.normal(size=100_000), 0),
    "mostly zero": RANDOM.normal(size=100_000) * (RANDOM.random(100_000) < 0.1),
    "lone outlier": np.append(RANDOM.normal(size=100_000), 20.0),
}
every_distribution = pytest.mark.parametrize("values", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
every_method = pytest.mark.parametrize("method", get_args(RangeMethod))


def histogram(*batches: np.ndarray) -> Histogram:
    made = Histogram()
    for values in batches:
        made.add(values)
    return made


def counted(values: np.ndarray, limit: float) -> np.ndarray:
    """The definition of the bins, one value after another."""
    counts = np.zeros(BINS, np.int64)
    for value in np.abs(values).ravel():
        counts[min(int(value / limit * BINS), BINS - 1)] += 1
    return counts


# --- counting ---


def test_a_value_is_counted_in_its_bin_whatever_its_sign_and_shape() -> None:
    values = np.append(RANDOM.integers(0, 1024, 2399) / 1024, 1.0) * RANDOM.choice([-1, 1], 2400)
    made = histogram(values.reshape(2, 3, 4, 100).astype(np.float32))
    assert made.limit == made.largest == 1
    np.testing.assert_array_equal(made.counts, counted(values, 1.0))


@pytest.mark.parametrize("growth", [1.001, 2, 5, 1000, 1e30])
def test_widening_moves_counts_to_the_wider_bins_and_loses_none(growth: float) -> None:
    """Multiples of a power of two fall on no rounding: the counts are exactly those of the wide range at once."""
    small = np.append(RANDOM.integers(0, 4096, 999) / 4096, 1.0)
    made = histogram(small, np.array([-growth]), small)
    assert made.largest == growth
    assert growth <= made.limit < 2 * growth
    first = np.append(small[:-1], 1 - 1 / BINS)  # the last bin holds its upper edge, until it is widened
    np.testing.assert_array_equal(made.counts, counted(np.concatenate([first, small, [growth]]), made.limit))


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20).map(np.array), min_size=1, max_size=6)
)
def test_the_order_of_images_loses_no_count(batches: list[np.ndarray]) -> None:
    forward, backward = histogram(*batches), histogram(*batches[::-1])
    total = np.concatenate(batches)
    assert forward.largest == backward.largest == np.abs(total).max()
    for made in (forward, backward):
        late_zeros = 0 if made.limit else len(total)  # a histogram of zeros has no range to count them in
        assert made.counts.sum() + late_zeros >= np.count_nonzero(total)
        assert made.counts.sum() <= len(total)


def test_a_large_tensor_is_sampled_and_its_largest_value_still_found() -> None:
    values = np.ones(2**20 + 1, np.float32)
    values[777] = -9
    made = histogram(values)
    assert made.largest == 9
    assert 2**17 <= made.counts.sum() <= 2**18


def test_a_sample_sees_every_channel() -> None:
    """A feed-forward's values, (tokens, channels): one channel in twenty is large, as in transformers."""
    values = RANDOM.normal(size=(1024, 1280)).astype(np.float32)
    values[:, 3::20] *= 20
    made = histogram(values)
    above = np.arange(BINS) >= int(5 / made.limit * BINS)
    true_share = np.mean(np.abs(values) > 5)  # a 25th or so
    assert made.counts[above].sum() / made.counts.sum() == pytest.approx(true_share, rel=0.2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    values = np.ones(100, np.float32)
    values[50] = bad
    with pytest.raises(MDNetError, match="not finite"):
        histogram(values)


def test_an_empty_tensor_adds_nothing() -> None:
    made = histogram(np.ones(3, np.float32), np.zeros((0, 4), np.float32))
    assert made.counts.sum() == 3


@pytest.mark.parametrize("values", [[1e-42], [2.5, 3e38]], ids=["denormal", "twice the range passes float32"])
def test_any_finite_float32_can_be_counted(values: list[float]) -> None:
    assert histogram(*np.array(values, np.float32)).counts.sum() == len(values)


# --- thresholds ---


@every_method
def test_a_tensor_of_zeros_has_the_threshold_zero(method: RangeMethod) -> None:
    assert histogram(np.zeros(100, np.float32)).threshold(method) == 0
    assert Histogram().threshold(method) == 0


@every_method
@every_distribution
def test_no_threshold_is_above_the_largest_value(values: np.ndarray, method: RangeMethod) -> None:
    made = histogram(values[:1000], values[1000:])
    assert 0 < made.threshold(method) <= np.abs(values).max()


@every_method
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**20])
def test_a_threshold_scales_with_the_values(method: RangeMethod, factor: float) -> None:
    values = DISTRIBUTIONS["student"]
    expected = histogram(values).threshold(method) * factor
    assert histogram(values * factor).threshold(method) == pytest.approx(expected, rel=1e-12)


@every_distribution
def test_minmax_is_the_largest_magnitude_exactly(values: np.ndarray) -> None:
    values = values.astype(np.float32)
    assert histogram(*np.array_split(values, 7)).threshold("minmax") == np.abs(values).max()


@every_distribution
def test_percentile_is_numpys_within_a_bin(values: np.ndarray) -> None:
    made = histogram(values)
    exact = np.percentile(np.abs(values), 99.99, method="inverted_cdf")
    assert exact <= made.threshold("percentile") <= exact + 1.001 * made.limit / BINS
    assert np.mean(np.abs(values) > made.threshold("percentile")) <= 1e-4


@every_method
def test_a_threshold_depends_on_shares_not_on_counts(method: RangeMethod) -> None:
    values = DISTRIBUTIONS["laplace"]
    assert histogram(values, values, values).threshold(method) == histogram(values).threshold(method)


# --- running a graph ---


def value(name: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["n", None])


W = RANDOM.normal(size=(8, 8)).astype(np.float32)


def graph() -> onnx.ModelProto:
    """x (n, 8) → a = x·w → r = relu a → y = −r; and k = int64 of r."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="m"),
        helper.make_node("Relu", ["a"], ["r"], name="r"),
        helper.make_node("Cast", ["r"], ["k"], name="c", to=TensorProto.INT64),
        helper.make_node("Neg", ["r"], ["y"], name="n"),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [value("x")],
        [value("y"), value("k", TensorProto.INT64)],
        [numpy_helper.from_array(W, "w")],
        value_info=[value("a"), value("r")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


FEEDS = [{"x": RANDOM.normal(size=(3, 8)).astype(np.float32) * scale} for scale in (1, 5, 0.5)]


def test_collect_counts_what_the_graph_computes() -> None:
    proto = graph()
    before = proto.SerializeToString()
    done = Recorded()
    found = collect(proto, ["x", "a", "y"], FEEDS, progress=done)
    a = [feed["x"] @ W for feed in FEEDS]
    x, y = [feed["x"] for feed in FEEDS], [np.maximum(each, 0) for each in a]
    expected = {"x": x, "a": a, "y": y}
    assert found.keys() == expected.keys()
    for name, batches in expected.items():
        assert found[name].largest == pytest.approx(max(np.abs(each).max() for each in batches), rel=1e-5)
        assert found[name].counts.sum() == sum(each.size for each in batches)
        # A value may be in the next bin: ONNX Runtime sums in another order.
        seen = np.cumsum(counted(np.concatenate(batches), found[name].limit))
        assert np.abs(np.cumsum(found[name].counts) - seen).max() <= 1
    assert done.counts == [(len(FEEDS), [1] * len(FEEDS))]
    assert proto.SerializeToString() == before


def test_collect_names_the_tensor_that_is_not_finite() -> None:
    feeds = [FEEDS[0], {"x": np.full((1, 8), 3e38, np.float32)}]
    with pytest.raises(MDNetError, match=r"^a: a value is not finite on a calibration image$"):
        collect(graph(), ["a", "r"], feeds)


def test_a_run_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    collect(graph(), ["a"], FEEDS)
    largest_magnitudes(graph(), FEEDS)
    with pytest.raises(MDNetError):
        collect(graph(), ["a"], [{"x": np.full((1, 8), np.nan, np.float32)}])
    assert list(tmp_path.iterdir()) == []


def test_largest_magnitudes_are_numpys_of_every_float_value() -> None:
    a = np.concatenate([feed["x"] @ W for feed in FEEDS])
    found = largest_magnitudes(graph(), FEEDS)
    assert found.keys() == {"x", "a", "r", "y"}  # not the integers
    assert found["x"] == max(np.abs(feed["x"]).max() for feed in FEEDS)
    assert found["a"] == pytest.approx(np.abs(a).max(), rel=1e-5)
    assert found["r"] == found["y"] == pytest.approx(a.max(), rel=1e-5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_an_infinite_value_is_infinitely_large(bad: float) -> None:
    x = np.zeros((4, 8), np.float32)
    x[2, 5] = bad
    assert largest_magnitudes(negated(), [FEEDS[0], {"x": x}, FEEDS[1]]) == {"x": np.inf, "a": np.inf, "y": np.inf}


@pytest.mark.parametrize("row", [0, 2])
def test_nan_is_infinitely_large_wherever_it_stands(row: int) -> None:
    x = np.ones((4, 8), np.float32)
    x[row, 5] = np.nan
    assert largest_magnitudes(negated(), [FEEDS[0], {"x": x}, FEEDS[1]]) == {"x": np.inf, "a": np.inf, "y": np.inf}


def negated() -> onnx.ModelProto:
    """x → a = x → y = −a: what is fed is what is found."""
    nodes = [helper.make_node("Identity", ["x"], ["a"], name="i"), helper.make_node("Neg", ["a"], ["y"], name="n")]
    made = helper.make_graph(nodes, "g", [value("x")], [value("y")], value_info=[value("a")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
