"""A data set of drawn faces with made-up ratings, in SCUT-FBP5500's layout, so that what reads the one reads the other.

    factors (known causes + looks) ── render_face ──> 350×350 picture
                     └─────────────── rating ───────> mean of 60 simulated raters, 1 to 5

The rule that rates is arbitrary and was chosen to be visible and learnable. It says nothing about real people,
nor about any group of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from mdnet.data.draw_face import GROUP_CYCLE, FaceFactors, draw_face
from mdnet.data.scut_fbp5500 import FOLDS
from mdnet_engines.errors import UsageError
from mdnet_engines.progress import SILENT, Progress
from mdnet_engines.system.atomic import new_folder

RATERS = 60

_FACES_A_PROCESS = 500  # fewer are drawn before another process is ready

_WEIGHTS = {"symmetry": 0.36, "proportions": 0.34, "texture": 0.30}
_RATER_BIAS = np.random.default_rng(5500).normal(0.0, 0.35, RATERS)  # the same 60 raters see every face
_RATER_NOISE = 0.65

_DRAWN = "drawn faces with made-up ratings"
_README = f"""{{count}} {_DRAWN}, in the layout of SCUT-FBP5500. Nothing here is that data set.

No picture shows a person: mdnet drew them all (seed {{seed}}). The "raters" are a random number generator, and what
they rate is how symmetric, how close to a drawing canon and how smooth a drawing was made. The ratings say nothing
about people, and a model that learned them has no opinion on a photograph.
"""


def noise_free_rating(factors: FaceFactors) -> float:
    """1 + 4 · (0.36 symmetry + 0.34 proportions + 0.30 texture), before the raters add bias and noise and round."""
    return 1 + 4 * sum(weight * getattr(factors, name) for name, weight in _WEIGHTS.items())


def rating(factors: FaceFactors, rng: np.random.Generator) -> float:
    """Mean score of 60 simulated raters, each an integer from 1 to 5.

    A rater's score is the noise-free rating plus the rater's own bias (sd 0.35, the same for every face) plus noise
    (sd 0.65), rounded and clipped. Over faces the mean is about 3 with sd about 0.65; its correlation with the
    noise-free rating, the ceiling for any model, is about 0.99. It's arithmetic on how a drawing was drawn, and
    claims nothing about how people look.
    """
    opinions = noise_free_rating(factors) + _RATER_BIAS + rng.normal(0.0, _RATER_NOISE, RATERS)
    return float(np.clip(np.rint(opinions), 1, 5).mean())


def write_dataset(root: Path, count: int, seed: int, progress: Progress = SILENT, *, test: int | None = None) -> None:
    """Write `count` drawn faces and their ratings to `root`, laid out like SCUT-FBP5500.

        Images/AF1.jpg …                                                350×350 JPEG
        train_test_files/All_labels.txt                                 lines like `CM148.jpg 3.516667`
        train_test_files/split_of_60%training and 40%testing/           train.txt, test.txt
        train_test_files/5_folders_cross_validations_files/             cross_validation_N/train_N.txt, test_N.txt
        ratings.csv                                                     with `test`: a table of the same, one split
        README.txt                                                      says that all of it is drawn

    Face k depends on `seed` and k alone: a larger `count` adds faces and keeps the names, pictures and ratings of
    those before. Splits are shuffled, stratified by group. The folder appears whole or not at all. `progress` is
    called with the number of faces just written.

    Args:
        test: also write a table whose last so many faces are its test list, for more to train on than 60 % are.

    Raises:
        UsageError: `root` exists and isn't an empty folder, `count` is below 5 (a fold would be empty), or `seed` is
            negative.
    """
    if count < FOLDS:
        raise UsageError(f"count is {count}; expected at least {FOLDS}, one face for every cross-validation fold")
    if test is not None and not 0 < test < count:
        raise UsageError(f"test is {test}; expected 1 to {count - 1}, fewer than the {count} faces")
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected 0 or more")
    root = root.resolve()

    def check_free() -> None:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UsageError(f"{root} exists and isn't an empty folder; it is left alone. Choose a new one")

    with new_folder(root, check_free) as scratch:
        (scratch / "Images").mkdir()
        labels = _write_images(scratch / "Images", count, seed, progress.count("drawing", count))
        _write_splits(scratch / "train_test_files", labels, _stream(seed, 1))
        if test is not None:
            _write_table(scratch / "ratings.csv", labels, test)
        (scratch / "README.txt").write_text(_README.format(count=count, seed=seed), encoding="utf-8")


def is_drawn(data: Path) -> bool:
    """Whether `write_dataset` made the folder, or the table in it, by the folder's README.txt."""
    root = data if data.is_dir() else data.parent
    try:
        return _DRAWN in (root / "README.txt").read_text(encoding="utf-8")[:200]
    except (OSError, UnicodeDecodeError):
        return False


def _write_images(folder: Path, count: int, seed: int, advance: Callable[[int], None]) -> dict[str, float]:
    """Draw the faces on all cores; gives the rating of each file name, in drawing order."""
    per_group, names = dict.fromkeys(GROUP_CYCLE, 0), list[str]()
    for index in range(count):
        group = GROUP_CYCLE[index % len(GROUP_CYCLE)]
        per_group[group] += 1
        names.append(f"{group}{per_group[group]}.jpg")
    workers = min(os.cpu_count() or 1, 1 + count // _FACES_A_PROCESS)
    work = [(folder / name, seed, index) for index, name in enumerate(names)]
    labels: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        results: Iterable[float] = map(_write_image, work)
        if workers > 1:
            # Not a fork: this process may have threads.
            pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
            results = stack.enter_context(pool).map(_write_image, work, chunksize=50)
        for name, mean in zip(names, results, strict=True):
            labels[name] = mean
            advance(1)
    return labels


def _write_image(work: tuple[Path, int, int]) -> float:
    """Draw face `index` of `seed` into a file; gives its rating."""
    file, seed, index = work
    rng = _stream(seed, 0, index)
    image, factors = draw_face(rng, group=GROUP_CYCLE[index % len(GROUP_CYCLE)])
    image.save(file, quality=92)
    return rating(factors, rng)


def _write_table(file: Path, labels: dict[str, float], test: int) -> None:
    lines = ["image,rating,group,split"]
    for index, (name, mean) in enumerate(labels.items()):
        part = "test" if index >= len(labels) - test else "train"
        lines.append(f"Images/{name},{mean:.6f},{name[:2]},{part}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _write_splits(folder: Path, labels: dict[str, float], rng: np.random.Generator) -> None:
    def write(path: Path, names: list[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name} {labels[name]:.6f}\n" for name in names), encoding="utf-8", newline="\n")

    def write_split(path: Path, suffix: str, test: set[str]) -> None:
        order = rng.permutation(list(labels)).tolist()
        write(path / f"train{suffix}.txt", [name for name in order if name not in test])
        write(path / f"test{suffix}.txt", [name for name in order if name in test])

    write(folder / "All_labels.txt", list(labels))
    fifths = _deal(labels, rng)
    write_split(folder / "split_of_60%training and 40%testing", "", {*fifths[0], *fifths[1]})
    for number, fold in enumerate(_deal(labels, rng), start=1):
        path = folder / "5_folders_cross_validations_files" / f"cross_validation_{number}"
        write_split(path, f"_{number}", set(fold))


def _deal(labels: dict[str, float], rng: np.random.Generator) -> list[list[str]]:
    """Five hands of names, equal in size and in each group's number to within one."""
    shuffled = sorted(rng.permutation(list(labels)).tolist(), key=lambda name: name[:2])  # stable: random in a group
    return [shuffled[hand::FOLDS] for hand in range(FOLDS)]


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
