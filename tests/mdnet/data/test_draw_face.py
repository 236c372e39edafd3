"""Drawn faces: deterministic, rated by their causes and nothing else, and written as SCUT-FBP5500 is."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from mdnet.data import drawn_set
from mdnet.data.draw_face import GROUP_CYCLE, FaceFactors, draw_face, draw_factors, render_face
from mdnet.data.drawn_set import noise_free_rating, rating, write_dataset
from mdnet.data.source import open_data
from mdnet_engines.errors import UsageError

CAUSES = ("symmetry", "proportions", "texture")
NUISANCES = tuple(field.name for field in dataclasses.fields(FaceFactors) if field.name not in CAUSES)
COUNT = 44
SMALL = 64  # pixels: what these tests ask of a picture doesn't need 350, and drawing is what takes time


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faces") / "drawn"
    write_dataset(root, COUNT, seed=3)
    return root


def _factors(seed: int, **changes: Any) -> FaceFactors:
    return dataclasses.replace(draw_factors(np.random.default_rng(seed)), **changes)


def _plain(**causes: float) -> FaceFactors:
    """A face with no nuisance that could tell its left half from its right."""
    even: dict[str, Any] = {
        "roll": 0.0,
        "shift": (0.0, 0.0),
        "light": (0.0, 0.0),
        "grain": 0.0,
        "parting": 0.0,
        "hair_length": 0.0,
    }
    return _factors(5, group="CM", **{"symmetry": 1.0, "proportions": 1.0, "texture": 1.0, **even, **causes})


def _pixels(factors: FaceFactors, size: int = SMALL) -> np.ndarray:
    return np.asarray(render_face(factors, size), np.float64)


def _lines(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines()
    labels = dict(line.split(" ") for line in lines)
    assert len(labels) == len(lines)  # no face twice in one file
    return labels


def _split(root: Path, fold: int | None) -> tuple[dict[str, str], dict[str, str]]:
    """Labels of the training and the test part: of cross-validation fold 1 to 5, or of the 60/40 split."""
    files = root / "train_test_files"
    if fold is None:
        folder, end = files / "split_of_60%training and 40%testing", ""
    else:
        folder, end = files / "5_folders_cross_validations_files" / f"cross_validation_{fold}", f"_{fold}"
    return _lines(folder / f"train{end}.txt"), _lines(folder / f"test{end}.txt")


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_same_generator_state_gives_same_face_and_other_state_another() -> None:
    (image, factors), (again, factors_again) = (draw_face(np.random.default_rng(1), SMALL) for _ in range(2))
    other, other_factors = draw_face(np.random.default_rng(2), SMALL)
    assert factors == factors_again
    assert image.tobytes() == again.tobytes()
    assert factors != other_factors
    assert image.tobytes() != other.tobytes()


def test_picture_is_rgb_of_the_size_asked_for() -> None:
    image, _ = draw_face(np.random.default_rng(0))
    small, _ = draw_face(np.random.default_rng(0), 90)
    assert (image.mode, image.size, small.size) == ("RGB", (350, 350), (90, 90))


@pytest.mark.parametrize("group", ["AF", "AM", "CF", "CM"])
def test_group_asked_for_is_the_group_drawn(group: str) -> None:
    assert draw_face(np.random.default_rng(0), SMALL, group)[1].group == group


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_raises_the_rating(cause: str) -> None:
    levels = [_factors(0, **{"symmetry": 0.5, "proportions": 0.5, "texture": 0.5, cause: x}) for x in (0, 0.3, 0.7, 1)]
    # 20 panels of 60 raters: standard error about 0.02, a step is at least 0.36.
    means = [np.mean([rating(factors, np.random.default_rng(panel)) for panel in range(20)]) for factors in levels]
    assert min(np.diff(means)) > 0.2
    assert min(np.diff([noise_free_rating(factors) for factors in levels])) > 0.3


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_visible_at_128_pixels(cause: str) -> None:
    best = _pixels(_plain(), 128)
    change = [np.abs(_pixels(_plain(**{cause: x}), 128) - best)[20:110, 24:104].mean() for x in (0.7, 0.0)]
    assert change[1] > change[0] > 0.5  # in grey levels, over the whole face


@pytest.mark.parametrize("nuisance", NUISANCES)
def test_nuisance_changes_the_picture_and_not_the_rating(nuisance: str) -> None:
    face, donor = _factors(21, group="CF"), _factors(23, group="AM")
    changed = dataclasses.replace(face, **{nuisance: getattr(donor, nuisance)})
    assert np.abs(_pixels(changed) - _pixels(face)).max() > 1  # more than rounding
    assert noise_free_rating(changed) == noise_free_rating(face)
    assert rating(changed, np.random.default_rng(0)) == rating(face, np.random.default_rng(0))


def test_symmetric_face_equals_its_mirror_image_and_lopsided_one_does_not() -> None:
    def one_sidedness(symmetry: float) -> float:
        face = _pixels(_plain(symmetry=symmetry), 128)[40:108, 28:100]  # without hair: its strands fall at random
        return np.abs(face - face[:, ::-1]).mean()

    # Not 0 at best: the glint in both eyes is on the right, and the nose throws its shadow to one side.
    assert one_sidedness(1.0) < 3
    assert one_sidedness(0.0) > 4 * one_sidedness(1.0)


def test_blemishes_survive_the_downscale_to_128_pixels() -> None:
    def roughness(texture: float) -> float:
        small = render_face(_plain(texture=texture)).resize((128, 128), Image.Resampling.BICUBIC)
        cheek = np.asarray(small, np.float64)[68:84, 34:50, 1]  # green, where red spots are darkest
        return np.abs(np.diff(cheek, axis=1)).mean()

    assert roughness(0.0) > 4 * roughness(1.0)


def test_ratings_are_means_of_sixty_integers_with_a_high_noise_ceiling() -> None:
    rng = np.random.default_rng(0)
    faces = [draw_factors(rng) for _ in range(1500)]
    ratings = np.array([rating(face, rng) for face in faces])
    assert ratings.min() >= 1
    assert ratings.max() <= 5
    np.testing.assert_allclose(ratings * 60, np.rint(ratings * 60), atol=1e-9)
    assert abs(ratings.mean() - 3) < 0.15
    assert 0.6 < ratings.std() < 0.8
    assert _pearson(ratings, np.array([noise_free_rating(face) for face in faces])) > 0.98


def test_worst_and_best_face_stay_within_the_scale() -> None:
    rng = np.random.default_rng(0)
    for level in (0.0, 1.0):
        assert 1 <= rating(_factors(0, **dict.fromkeys(CAUSES, level)), rng) <= 5


def test_mean_colour_hardly_says_anything_about_the_rating() -> None:
    faces = [draw_face(np.random.default_rng(seed), 48) for seed in range(160)]
    ratings = np.array([noise_free_rating(factors) for _, factors in faces])
    colours = np.array([np.asarray(image, np.float64).mean(axis=(0, 1)) for image, _ in faces])  # (160, 3)
    skin = np.array([np.sum(factors.skin) for _, factors in faces])
    # Independent by construction, and 0.3 is almost 4 standard errors at 160 faces.
    assert max(abs(_pearson(channel, ratings)) for channel in (*colours.T, skin)) < 0.3


def test_dataset_has_exactly_the_files_of_scut_fbp5500(dataset: Path) -> None:
    files = {path.relative_to(dataset).as_posix() for path in dataset.rglob("*") if path.is_file()}
    folds = "train_test_files/5_folders_cross_validations_files/cross_validation_"
    last = {"AF": 16, "AM": 16, "CF": 6, "CM": 6}
    pictures = {f"{group}{number}.jpg" for group in last for number in range(1, last[group] + 1)}
    assert files == {
        "README.txt",
        *(f"Images/{name}" for name in pictures),
        "train_test_files/All_labels.txt",
        "train_test_files/split_of_60%training and 40%testing/train.txt",
        "train_test_files/split_of_60%training and 40%testing/test.txt",
        *(f"{folds}{n}/{part}_{n}.txt" for n in range(1, 6) for part in ("train", "test")),
    }
    assert "drew" in (dataset / "README.txt").read_text()
    with Image.open(dataset / "Images" / "CM6.jpg") as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (350, 350))


def test_label_lines_are_name_one_space_and_six_decimals(dataset: Path) -> None:
    for file in (dataset / "train_test_files").rglob("*.txt"):
        assert re.fullmatch(rb"([AC][FM][1-9]\d*\.jpg [1-5]\.\d{6}\n)+", file.read_bytes()), file


def test_all_labels_name_every_picture(dataset: Path) -> None:
    labels = _lines(dataset / "train_test_files" / "All_labels.txt")
    assert set(labels) == {path.name for path in (dataset / "Images").iterdir()}


@pytest.mark.parametrize("fold", [None, 1, 2, 3, 4, 5])
def test_no_face_is_in_training_and_test(dataset: Path, fold: int | None) -> None:
    train, test = _split(dataset, fold)
    assert not set(train) & set(test)
    assert {**train, **test} == _lines(dataset / "train_test_files" / "All_labels.txt")
    assert abs(len(test) - COUNT * (0.4 if fold is None else 0.2)) <= 1


def test_every_face_is_in_exactly_one_test_fold(dataset: Path) -> None:
    seen = Counter(name for fold in range(1, 6) for name in _split(dataset, fold)[1])
    assert seen == dict.fromkeys(_lines(dataset / "train_test_files" / "All_labels.txt"), 1)


@pytest.mark.parametrize("fold", [None, 1, 2, 3, 4, 5])
def test_splits_are_stratified_by_group_and_shuffled(dataset: Path, fold: int | None) -> None:
    train, test = _split(dataset, fold)
    share = len(test) / COUNT
    groups, tested = (Counter(name[:2] for name in names) for names in ({**train, **test}, test))
    # A fifth is within one face of even in every group, so two fifths are within two.
    assert all(abs(tested[group] - share * size) < 2 for group, size in groups.items())
    assert list(train) != sorted(train, key=list(_lines(dataset / "train_test_files" / "All_labels.txt")).index)


def test_full_size_set_would_have_the_groups_of_scut_fbp5500() -> None:
    groups = Counter(GROUP_CYCLE[index % len(GROUP_CYCLE)] for index in range(5500))
    assert groups == {"AF": 2000, "AM": 2000, "CF": 750, "CM": 750}


def test_first_faces_are_the_same_whatever_the_count(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", 6, seed=3)
    many = _lines(dataset / "train_test_files" / "All_labels.txt")
    few = _lines(tmp_path / "few" / "train_test_files" / "All_labels.txt")
    assert list(few.items()) == list(many.items())[:6]
    for name in few:
        assert (tmp_path / "few" / "Images" / name).read_bytes() == (dataset / "Images" / name).read_bytes()


def test_several_processes_draw_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "one", 24, 3)
    monkeypatch.setattr(drawn_set, "_FACES_A_PROCESS", 12)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    write_dataset(tmp_path / "two", 24, 3)
    for file in sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


def test_a_table_with_its_own_test_list_is_written_where_asked(tmp_path: Path) -> None:
    write_dataset(tmp_path / "faces", 12, 0, test=3)
    data = open_data(tmp_path / "faces" / "ratings.csv")
    (split,) = data.splits(data.protocol(None, training=True))
    assert (len(split.train), len(split.test)) == (9, 3)
    labels = (tmp_path / "faces" / "train_test_files" / "All_labels.txt").read_text().split()
    assert [image.name for image in split.test.images] == labels[-6::2]
    assert split.test.ratings.tolist() == pytest.approx([float(text) for text in labels[-5::2]], abs=1e-6)
    assert split.test.groups == [name[:2] for name in labels[-6::2]]
    with pytest.raises(UsageError, match="test is 12; expected 1 to 11"):
        write_dataset(tmp_path / "others", 12, 0, test=12)


def test_drawn_faces_are_known_as_such_by_folder_and_by_table(tmp_path: Path) -> None:
    write_dataset(tmp_path / "faces", 5, 0, test=2)
    assert drawn_set.is_drawn(tmp_path / "faces")
    assert drawn_set.is_drawn(tmp_path / "faces" / "ratings.csv")
    assert not drawn_set.is_drawn(tmp_path)
    assert not drawn_set.is_drawn(tmp_path / "mine.csv")


def test_seed_decides_everything_in_the_folder(tmp_path: Path) -> None:
    contents = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        root = tmp_path / folder
        write_dataset(root, 5, seed=seed)
        contents.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]
    for file in (Path("Images/AF1.jpg"), Path("train_test_files/All_labels.txt")):
        assert contents[0][file] != contents[2][file]


def test_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="isn't an empty folder"):
        write_dataset(tmp_path, 5, seed=0)
    with pytest.raises(UsageError, match="isn't an empty folder"):
        write_dataset(tmp_path / "mine.txt", 5, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(("count", "seed"), [(4, 0), (0, 0), (5, -1)])
def test_numbers_that_cannot_make_a_dataset_are_refused(tmp_path: Path, count: int, seed: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        write_dataset(tmp_path / "faces", count, seed)
    assert not list(tmp_path.iterdir())


def test_empty_folder_is_filled_and_progress_counts_up(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    root.mkdir()
    progress = Recorded()
    write_dataset(root, 5, seed=0, progress=progress)
    assert progress.counts == [(5, [1, 1, 1, 1, 1])]
    assert len(list((root / "Images").iterdir())) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["faces"]


def test_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    drawn: list[object] = []

    def interrupt(done: str | int) -> None:
        drawn.append(done)
        if len(drawn) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "faces", 5, seed=0, progress=Recorded(interrupt))
    assert not list(tmp_path.iterdir())
