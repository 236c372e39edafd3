"""The measuring itself: it must see what is wrong with a bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from mdnet_engines.bundle.manifest import ScoreScale
from mdnet_engines.parity.gates import LIMITS, LIMITS_SCALE, RATED_IMAGES, limits_for, rating_gates
from mdnet_engines.parity.measure import Images, compare, compare_with_ratings, measure
from mdnet_engines.parity.report import Gate, ParityReport
from mdnet_engines.parity.report_json import from_json, to_json

Arrays = Mapping[str, np.ndarray]


class FakeSession:
    """A graph made of a Python function."""

    def __init__(self, inputs: tuple[str, ...], function: Callable[[Arrays], dict[str, np.ndarray]]):
        self.inputs, self.function = inputs, function
        self.outputs = tuple(function({name: np.zeros((1, 2, 2, 3), np.float32) for name in inputs}))

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        return self.function(feeds)


def mean(image: np.ndarray) -> np.ndarray:
    return image.reshape(len(image), -1).mean(1).astype(np.float32) / 64 + 1


def sessions(score: Callable[[np.ndarray], np.ndarray] = lambda value: value) -> dict[str, FakeSession]:
    return {
        "encoder": FakeSession(("image",), lambda feeds: {"local": mean(feeds["image"])}),
        "vim": FakeSession(("image",), lambda feeds: {"tokens": mean(feeds["image"])}),
        "fusion": FakeSession(("local", "tokens"), lambda f: {"score": score((f["local"] + f["tokens"]) / 2)}),
    }


PIXELS = np.random.default_rng(0).integers(0, 2, (12, 2, 2, 3), dtype=np.uint8) * 255
PIXELS = (PIXELS * np.linspace(0.1, 1, 12)[:, None, None, None]).astype(np.uint8)
IMAGES = Images([f"{i}.jpg" for i in range(12)], PIXELS, "made up")
REFERENCE = {"local": mean(PIXELS), "tokens": mean(PIXELS), "score": mean(PIXELS)}


def measured(
    graphs: Mapping[str, FakeSession],
    reference: dict[str, np.ndarray],
    images: Images,
    precision: str,
    scale: ScoreScale = LIMITS_SCALE,
) -> ParityReport:
    return measure(graphs, reference, images, precision=precision, scale=scale, backend="fake")  # type: ignore[arg-type]


def report(score: Callable[[np.ndarray], np.ndarray], precision: str = "fp32") -> ParityReport:
    return measured(sessions(score), REFERENCE, IMAGES, precision)


def failed(score: Callable[[np.ndarray], np.ndarray], precision: str = "fp32") -> set[str]:
    return {gate.name for gate in report(score, precision).gates if gate.failed}


def test_an_exact_bundle_passes() -> None:
    result = report(lambda value: value)
    assert result.passed
    assert result.summary().max_abs == 0
    assert result.summary().pearson == pytest.approx(1)


def test_an_offset_fails_and_is_measured() -> None:
    result = report(lambda value: value + 0.25)
    assert not result.passed
    assert result.summary().max_abs == pytest.approx(0.25, abs=1e-5)
    assert result.summary().mean_abs == pytest.approx(0.25, abs=1e-5)
    assert result.graphs["fusion"]["score"].max_abs == pytest.approx(0.25, abs=1e-5)
    assert result.graphs["vim"]["tokens"].max_abs == 0  # the deviation is charged to the graph that made it


def test_one_bad_image_among_good_ones_fails() -> None:
    top = mean(PIXELS).max()
    assert "score max |Δ|" in failed(lambda value: np.where(value == top, value + 0.01, value))


def test_a_limit_is_the_precisions() -> None:
    offset = (LIMITS["fp32"].score_max_abs + LIMITS["fp16"].score_max_abs) / 2
    assert "score max |Δ|" in failed(lambda value: value + offset)
    assert "score max |Δ|" not in failed(lambda value: value + offset, "fp16")


@pytest.mark.parametrize(("offset", "gates"), [(0.019, set()), (0.021, {"score mean |Δ|"})])
def test_fp8_may_move_scores_by_0_02_on_average(offset: float, gates: set[str]) -> None:
    assert failed(lambda value: value + offset, "fp8") == gates


def test_fp8_may_move_one_score_by_0_1() -> None:
    top = mean(PIXELS).max()
    for offset, fails in ((0.099, False), (0.101, True)):
        gates = failed(lambda value, by=offset: np.where(value == top, value + by, value), "fp8")  # type: ignore[misc]
        assert ("score max |Δ|" in gates) is fails


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_fails(bad: float) -> None:
    assert "scores that are not finite" in failed(lambda value: value * 0 + np.float32(bad))


def test_rows_of_a_batch_that_differ_fail() -> None:
    """A batch of equal images must give equal scores: engines have been seen to break this."""

    def drifting(value: np.ndarray) -> np.ndarray:
        return value + 0.01 * np.arange(len(value), dtype=np.float32)

    assert failed(drifting) == {"batch of copies, max |Δ| between rows", "batch against singles, max |Δ|"}


def test_an_order_that_changes_in_batches_fails() -> None:
    assert "batch against singles, max |Δ|" in failed(lambda value: value[::-1])


def test_constant_scores_have_no_correlation_to_fail() -> None:
    flat = {**REFERENCE, "score": np.full(12, 3, np.float32)}
    result = measured(sessions(lambda v: v * 0 + 3), flat, IMAGES, "fp32")
    gate = next(gate for gate in result.gates if gate.name == "score Pearson")
    assert (gate.value, gate.verdict) == (None, "not evaluated")
    assert "hardly vary: their sd is below 0.02" in gate.note
    assert result.passed
    summary = result.summary()
    assert summary.pearson is None
    assert summary.not_evaluated == f"score Pearson ({gate.note})"
    assert str(summary) == f"{summary.figures()}; not evaluated: {summary.not_evaluated}"


# --- another scale ---


def rescaled(scale: ScoreScale, error: float) -> ParityReport:
    """The report of a bundle whose scores are off by `error` widths of the scale, on the scale's own ratings."""

    def on_scale(value: np.ndarray) -> np.ndarray:
        return scale.minimum + scale.width * (value - 1) / 4

    def off(value: np.ndarray) -> np.ndarray:
        return on_scale(value) + error * scale.width * np.where(value > value.mean(), 1, -1)

    reference = {**REFERENCE, "score": on_scale(REFERENCE["score"])}
    return measured(sessions(off), reference, IMAGES, "int8", scale)


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (0, 10), (0, 100), (-350, 50)])
@pytest.mark.parametrize("error", [0.001, 0.007, 0.01, 0.03])
def test_a_verdict_does_not_depend_on_the_scale(scale: tuple[float, float], error: float) -> None:
    """The same error, in widths, has the same verdicts, cosine and SNR on every scale; limits grow with the width."""
    own = ScoreScale(minimum=scale[0], maximum=scale[1])
    ours, theirs = rescaled(LIMITS_SCALE, error), rescaled(own, error)
    assert [gate.verdict for gate in theirs.gates] == [gate.verdict for gate in ours.gates]
    assert theirs.graphs["fusion"]["score"].snr_db == pytest.approx(ours.graphs["fusion"]["score"].snr_db, abs=0.01)
    assert theirs.graphs["fusion"]["score"].cosine == pytest.approx(ours.graphs["fusion"]["score"].cosine, abs=1e-6)
    assert theirs.graphs["fusion"]["score"].max_abs == pytest.approx(error * own.width, rel=1e-3)
    limits = {gate.name: gate.limit for gate in theirs.gates}
    assert limits["score max |Δ|"] == pytest.approx(0.15 * own.width / 4)
    assert limits["score mean |Δ|"] == pytest.approx(0.03 * own.width / 4)
    assert limits["batch against singles, max |Δ|"] == pytest.approx(0.02 * own.width / 4)


def test_limits_without_a_unit_are_the_same_on_every_scale() -> None:
    wide = limits_for("int8", ScoreScale(minimum=0, maximum=100))
    for name in ("score_pearson", "rating_loss", "graph_cosine", "graph_snr_db"):
        assert getattr(wide, name) == getattr(LIMITS["int8"], name)
    assert limits_for("int8", LIMITS_SCALE) == LIMITS["int8"]


# --- against ratings ---

RATING_GATE = "Pearson with the ratings, lost"


def rated(count: int, noise: float, precision: str = "int8") -> tuple[Gate, float]:
    """The rating gate of a bundle whose scores are off by noise, and how much correlation that costs, by NumPy.

    The model's own scores correlate with the ratings by about 0.93, as published.
    """
    random = np.random.default_rng(1)
    shades = np.linspace(10, 250, count)[random.permutation(count)]
    pixels = np.broadcast_to(shades[:, None, None, None], (count, 2, 2, 3)).astype(np.uint8)
    scores = mean(pixels)
    ratings = scores + random.normal(0, 0.4 * scores.std(), count)
    off = {float(score): random.normal(0, noise * scores.std()) for score in np.unique(scores)}

    @np.vectorize
    def disturbed(value: float) -> np.float32:
        return np.float32(value + off.get(float(value), 0.0))  # 0: of the shapes that a session is made with

    reference = {"local": scores, "tokens": scores, "score": scores}
    images = Images([f"{i}.jpg" for i in range(count)], pixels, "made up", ratings)
    result = measured(sessions(disturbed), reference, images, precision)
    lost = np.corrcoef(ratings, scores)[0, 1] - np.corrcoef(ratings, disturbed(scores))[0, 1]
    return next(gate for gate in result.gates if gate.name == RATING_GATE), float(lost)


def test_a_correlation_with_the_ratings_that_is_lost_fails() -> None:
    gate, lost = rated(200, noise=0.3)
    assert lost > 5 * LIMITS["int8"].rating_loss
    assert gate.value == pytest.approx(lost, abs=1e-6)
    assert gate.verdict == "fail"


def test_a_correlation_with_the_ratings_that_is_kept_passes() -> None:
    gate, lost = rated(200, noise=0.01)
    assert gate.value == pytest.approx(lost, abs=1e-6)
    assert abs(lost) < LIMITS["int8"].rating_loss
    assert gate.verdict == "pass"


def test_few_ratings_say_nothing() -> None:
    gate, lost = rated(RATED_IMAGES - 1, noise=0.3)
    assert lost > LIMITS["int8"].rating_loss
    assert (gate.value, gate.verdict, gate.note) == (None, "not evaluated", "fewer than 100 rated images")
    assert rated(RATED_IMAGES, noise=0.3)[0].value is not None


def grouped(sizes: dict[str, int], spoiled: str) -> ParityReport:
    """Of a bundle that shuffles the scores of one group, and gives all others exactly."""
    random = np.random.default_rng(4)
    groups = [group for group, size in sizes.items() for _ in range(size)]
    shades = np.linspace(10, 250, len(groups))[random.permutation(len(groups))]
    pixels = np.broadcast_to(shades[:, None, None, None], (len(groups), 2, 2, 3)).astype(np.uint8)
    scores = mean(pixels)
    rows = np.flatnonzero(np.array(groups) == spoiled)
    swapped = dict(zip(scores[rows].tolist(), scores[random.permutation(rows)].tolist(), strict=True))

    @np.vectorize
    def disturbed(value: float) -> np.float32:
        return np.float32(swapped.get(float(value), value))

    ratings = scores + random.normal(0, 0.4 * scores.std(), len(groups))
    images = Images([f"{i}.jpg" for i in range(len(groups))], pixels, "made up", ratings, groups)
    reference = {"local": scores, "tokens": scores, "score": scores}
    return measured(sessions(disturbed), reference, images, "int8")


def test_each_group_has_a_gate_of_its_own() -> None:
    """A group that loses its order is found though it is a small part of all; one with few images is not judged."""
    result = grouped({"AF": 100, "CM": 100, "tiny": 15}, spoiled="CM")
    verdicts = {gate.name: gate.verdict for gate in result.gates if gate.name.startswith(RATING_GATE)}
    assert verdicts == {
        RATING_GATE: "fail",
        f"{RATING_GATE} in AF": "pass",
        f"{RATING_GATE} in CM": "fail",
        f"{RATING_GATE} in 1 of 3 groups": "not evaluated",
    }
    assert result.not_evaluated() == f"{RATING_GATE} in 1 of 3 groups (fewer than 100 rated images)"
    rows = {part.group: part for part in result.ratings}
    assert {group: part.images for group, part in rows.items()} == {"all": 215, "AF": 100, "CM": 100, "tiny": 15}
    assert rows["AF"].lost == pytest.approx(0, abs=1e-6)
    assert rows["CM"].lost == pytest.approx(rows["CM"].reference - rows["CM"].bundle)
    assert rows["CM"].lost > 0.3
    assert rows["CM"].of_width == pytest.approx(rows["CM"].mean_abs / 4)
    assert from_json(json.loads(json.dumps(to_json(result)))) == result


def test_groups_that_cannot_be_judged_share_a_gate() -> None:
    result = grouped({"AF": 100, **{f"small {i}": 3 for i in range(5)}}, spoiled="AF")
    assert result.not_evaluated() == f"{RATING_GATE} in 5 of 6 groups (fewer than 100 rated images)"


@pytest.mark.parametrize("groups", [["", ""], ["AF", "AF"], ["AF", ""]])
def test_one_group_is_no_comparison(groups: list[str]) -> None:
    ratings, scores = np.array([1.0, 2.0]), np.array([1.5, 2.5])
    assert [part.group for part in compare_with_ratings(ratings, groups, scores, scores, LIMITS_SCALE)] == ["all"]


def test_scores_that_are_not_finite_leave_the_correlation_open() -> None:
    ratings, scores = np.linspace(1, 5, 120), np.linspace(1, 5, 120)
    (part,) = compare_with_ratings(ratings, None, scores, np.where(scores > 4, math.inf, scores), LIMITS_SCALE)
    (gate,) = rating_gates(LIMITS["int8"], [part])
    assert (gate.verdict, part.images) == ("not evaluated", 120)


def test_images_without_ratings_have_no_such_gate() -> None:
    assert RATING_GATE not in {gate.name for gate in report(lambda value: value).gates}


def test_the_mean_is_a_gate_of_its_own() -> None:
    """In int8 a single score may be off by far more than all of them on average."""
    limits = LIMITS["int8"]
    between = (limits.score_mean_abs + limits.score_max_abs) / 2
    assert "score mean |Δ|" in failed(lambda value: value + between, "int8")
    top = mean(PIXELS).max()
    assert not {"score mean |Δ|", "score max |Δ|"} & failed(
        lambda value: np.where(value == top, value + between, value), "int8"
    )


def test_compare_measures_what_it_says() -> None:
    a = np.array([3.0, 4.0])
    shifted = compare(a, a + np.array([0.0, 0.5]))
    assert shifted.max_abs == 0.5
    assert shifted.snr_db == pytest.approx(10 * math.log10(25 / 0.25))
    assert compare(a, 2 * a).cosine == pytest.approx(1)
    assert compare(a, np.array([-4.0, 3.0])).cosine == pytest.approx(0)
    assert compare(a, a).snr_db == math.inf
    assert compare(a * 0, a * 0).cosine == 1
    assert compare(a * 0, a).cosine == 0
