"""The choice of calibration images: readable ones, of every kind, none of those that the result is judged on."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from mdnet_calib.calibration_set import MIN_IMAGES, CalibrationSet, k_centre, load_set, refuse_overlap, stratified
from mdnet_engines.errors import UsageError

RANDOM = np.random.default_rng(0)
SCUT = {"AF": 1200, "AM": 1200, "CF": 450, "CM": 450}  # the training list of 60-40


def pictures(folder: Path, count: int) -> list[Path]:
    """PNGs of the size that the graphs take, so that preprocessing leaves them as they are."""
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        Image.fromarray(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
    return files


# --- load_set ---


def test_what_can_not_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    files = pictures(tmp_path, 10)
    files[3].write_text("no image")
    files[7].write_bytes(files[7].read_bytes()[:200])
    files.append(tmp_path / "missing.png")
    done = Recorded()
    found = load_set(files, 64, "my faces", progress=done)
    good = [file for i, file in enumerate(files) if i not in (3, 7, 10)]
    assert found.names == [file.name for file in good]
    assert (found.skipped, found.source, done.counts) == (3, "my faces", [(11, [1] * 11)])
    np.testing.assert_array_equal(found.pixels, [np.asarray(Image.open(file)) for file in good])


def test_too_few_images_are_refused_with_the_reason(tmp_path: Path) -> None:
    files = pictures(tmp_path, MIN_IMAGES)
    assert len(load_set(files, 64, "faces").names) == MIN_IMAGES
    files[0].write_text("no image")
    with pytest.raises(UsageError) as caught:
        load_set(files, 64, "faces")
    assert (
        str(caught.value) == "faces has 7 usable images (1 could not be read); calibration needs at least 8, better 64"
    )
    with pytest.raises(UsageError, match=r"^faces has 0 usable images; calibration needs"):
        load_set([], 64, "faces")


def test_the_digest_is_of_the_pixels_and_a_part_keeps_its_names(tmp_path: Path) -> None:
    files = pictures(tmp_path, 9)
    found = load_set(files, 64, "faces")
    assert found.digest == load_set(files, 64, "elsewhere").digest
    part = found.take([5, 2])
    assert part.names == ["5.png", "2.png"]
    np.testing.assert_array_equal(part.pixels, found.pixels[[5, 2]])
    assert part.digest != found.take([2, 5]).digest
    found.pixels[-1, -1, -1, -1] ^= 1
    assert found.digest != load_set(files, 64, "faces").digest


# --- stratified ---


def population(sizes: dict[str, int], seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Ratings and groups in no order; the groups are rated differently."""
    random = np.random.default_rng(seed)
    groups = [group for group, count in sizes.items() for _ in range(count)]
    groups = [groups[i] for i in random.permutation(len(groups))]
    return np.clip(random.normal([2 + list(sizes).index(group) / 2 for group in groups], 0.5), 1, 5), groups


@pytest.mark.parametrize("count", [64, 200])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_taken_in_proportion(count: int, seed: int) -> None:
    """Within the five that the five strata of a group may be off by, each by one."""
    ratings, groups = population(SCUT, seed)
    taken = Counter(groups[row] for row in stratified(ratings, groups, count, seed))
    for group, size in SCUT.items():
        assert abs(taken[group] - count * size / len(groups)) <= 5


@pytest.mark.parametrize("count", [8, 16])
def test_few_images_cover_every_group(count: int) -> None:
    """8 is what fp16 takes by default: three, three, one and one of the groups."""
    missed = set()
    for seed in range(50):
        ratings, groups = population(SCUT, seed)
        missed |= set(SCUT) - {groups[row] for row in stratified(ratings, groups, count, seed)}
    assert not missed


def test_ratings_are_taken_over_their_range_in_each_group() -> None:
    ratings, groups = population(SCUT)
    rows = stratified(ratings, groups, 200)
    for group, size in SCUT.items():
        members = ratings[[of == group for of in groups]]
        taken = ratings[[row for row in rows if groups[row] == group]]
        fifths = np.digitize(taken, np.quantile(members, [0.2, 0.4, 0.6, 0.8]))
        per_fifth = 200 * size / len(groups) / 5
        assert all(abs(np.sum(fifths == i) - per_fifth) <= 2 for i in range(5))


def test_no_rating_within_a_group_is_preferred() -> None:
    """The mean of 100 choices of 20: its own standard deviation is 0.5 / √2000, about 0.01."""
    ratings, groups = population({"AF": 400})
    chosen = [row for seed in range(100) for row in stratified(ratings, groups, 20, seed)]
    assert ratings[chosen].mean() == pytest.approx(ratings.mean(), abs=0.04)


def test_a_choice_is_repeatable_and_repeats_no_image() -> None:
    ratings, groups = population({"AF": 40, "AM": 3, "CF": 1})
    for count in (1, 10, 43):
        rows = stratified(ratings, groups, count, seed=7)
        assert rows == stratified(ratings, groups, count, seed=7)
        assert len(set(rows)) == len(rows) == count
    assert stratified(ratings, groups, 10, seed=7) != stratified(ratings, groups, 10, seed=8)
    assert stratified(ratings, groups, 1000) == list(range(44))


# --- k_centre ---


def radius(features: np.ndarray, rows: list[int]) -> float:
    """The largest distance of a row to the nearest chosen one, in columns of unit spread."""
    points = (features - features.mean(axis=0)) / features.std(axis=0)
    return float(np.linalg.norm(points[:, None] - points[None, rows], axis=2).min(axis=1).max())


@pytest.mark.parametrize("seed", range(10))
def test_the_radius_is_at_most_twice_the_best(seed: int) -> None:
    """Against all 120 choices of three of ten."""
    features = np.random.default_rng(seed).normal(size=(10, 2)) ** 3
    best = min(radius(features, list(rows)) for rows in itertools.combinations(range(10), 3))
    assert radius(features, k_centre(features, 3)) <= 2 * best + 1e-9


def test_rare_images_are_covered_where_a_random_choice_misses_them() -> None:
    features = RANDOM.normal(size=(500, 6))
    features[:5] += 12
    random = [radius(features, list(RANDOM.choice(500, 20, replace=False))) for _ in range(50)]
    assert radius(features, k_centre(features, 20)) < min(random)


def test_no_column_counts_more_for_its_unit() -> None:
    features = RANDOM.normal(size=(60, 3))
    assert k_centre(features, 8) == k_centre(features * [1000, 1, 0.001] + [5, 0, -7], 8)


def test_equal_images_are_no_obstacle() -> None:
    features = np.zeros((6, 4))
    assert len(set(k_centre(features, 4))) == 4
    assert k_centre(features, 9) == [0, 1, 2, 3, 4, 5]


# --- refuse_overlap ---


def test_the_same_pixels_are_found_under_another_name() -> None:
    judged = RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    fresh = RANDOM.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    names = [f"mine{i}.png" for i in range(8)]
    refuse_overlap(CalibrationSet(names, fresh, "mine"), judged, "test images")
    shared = fresh.copy()
    shared[[2, 5]] = judged[[4, 0]]
    with pytest.raises(UsageError, match=r"^2 calibration images are also test images, such as mine2\.png: [^\n]+$"):
        refuse_overlap(CalibrationSet(names, shared, "mine"), judged, "test images")
    shared[[2, 5], 0, 0, 0] ^= 1  # another picture, if hardly
    refuse_overlap(CalibrationSet(names, shared, "mine"), judged, "test images")
