"""The reader of SCUT-FBP5500's layout: what the lists say, and every way in which they can be wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mdnet.data.rated import Rated, Split
from mdnet.data.scut_fbp5500 import GROUPS, RELEASED_SIZES, Protocol, departures, group_of, read_splits
from mdnet_engines.errors import MDNetError, UsageError

HALVES = "train_test_files/split_of_60%training and 40%testing"
FOLDS = "train_test_files/5_folders_cross_validations_files"


@pytest.fixture
def copy(faces: Path, tmp_path: Path) -> Path:
    """The drawn faces with lists of one's own to break; the images are shared."""
    root = tmp_path / "copy"
    shutil.copytree(faces / "train_test_files", root / "train_test_files")
    (root / "Images").symlink_to(faces / "Images")
    return root


def test_splits_are_the_files(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    first, rating = (faces / HALVES / "train.txt").read_text().splitlines()[0].split()
    assert split.train.images[0] == faces / "Images" / first
    assert split.train.ratings[0] == pytest.approx(float(rating))
    assert (len(split.train), len(split.test)) == (36, 24)


def test_five_folds_test_every_image_once_and_train_on_the_others(faces: Path) -> None:
    folds = read_splits(faces, "cv5")
    assert [fold.name for fold in folds] == [f"fold {n}" for n in range(1, 6)]
    assert set(Counter(image for fold in folds for image in fold.test.images).values()) == {1}
    for fold in folds:
        assert not set(fold.train.images) & set(fold.test.images)
        assert len(fold.train) + len(fold.test) == 60


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_drawn_faces_depart_from_the_released_set_in_size_alone(faces: Path, protocol: Protocol) -> None:
    (note,) = departures(faces, protocol, read_splits(faces, protocol))
    train, test = RELEASED_SIZES[protocol]
    assert f"the released {train} + {test}" in note
    assert ("36 + 24" if protocol == "60-40" else "48 + 12") in note


def test_the_group_is_in_the_name(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    assert split.test.groups == [image.name[:2] for image in split.test.images]
    assert set(split.test.groups) == set(GROUPS)
    assert group_of("CM148.jpg") == "CM"


@pytest.mark.parametrize(
    "name", ["ZZ9.jpg", "AF.jpg", "af1.jpg", "AF1.png", "AF1.jpg.jpg", "../AF1.jpg", "fty276.jpg", ""]
)
def test_other_names_have_no_group(name: str) -> None:
    with pytest.raises(MDNetError, match="is not a name of SCUT-FBP5500"):
        group_of(name)


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("train", "AF1.jpg 3.0\nAM1.jpg high\n", r"train.txt:2: expected `NAME.jpg RATING`, got 'AM1.jpg high'"),
        ("train", "AF1.jpg\n", r"train.txt:1: expected `NAME.jpg RATING`"),
        ("train", "3.5\n", r"train.txt:1: expected `NAME.jpg RATING`"),
        ("train", "AF1.jpg 3.0\n\nfty276.jpg 2.0\n", r"train.txt:3: 'fty276.jpg' is not a name of SCUT-FBP5500"),
        ("train", "../AF1.jpg 3.0\n", r"train.txt:1: '../AF1.jpg' is not a name"),
        ("train", "AF1.jpg  3.0\n", r"train.txt:1: 'AF1.jpg ' is not a name"),
        ("train", "AF1.jpg 5.01\n", r"train.txt:1: the rating of AF1.jpg is 5.01; expected 1 to 5"),
        ("train", "AF1.jpg 0\n", r"train.txt:1: the rating of AF1.jpg is 0; expected 1 to 5"),
        ("train", "AF1.jpg nan\n", r"train.txt:1: the rating of AF1.jpg is nan; expected 1 to 5"),
        (
            "train",
            "AF2.jpg 2\nAF1.jpg 3\nAF2.jpg 2\n",
            r"train.txt:3: AF2.jpg is listed twice; it is on line 1 already",
        ),
        ("train", "AF1.jpg 3\nCM99.jpg 3\n", r"train.txt:2: 1 of its images are missing, such as .*Images/CM99.jpg"),
        ("test", "\n", "test.txt lists no image"),
        ("test", None, "test.txt is missing; is the data set unpacked whole?"),
        ("test", "\udcff", "test.txt is not text in UTF-8"),
    ],
)
def test_a_broken_list_says_where(copy: Path, part: str, text: str | None, reason: str) -> None:
    file = copy / HALVES / f"{part}.txt"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(MDNetError, match=reason):
        read_splits(copy, "60-40")


@pytest.mark.parametrize("text", ["\ufeffAF1.jpg 3.5\r\nAM1.jpg 1\r\n", "AF1.jpg 3.5\n\n  AM1.jpg 1.000000  \n"])
def test_a_list_from_another_system_reads_the_same(copy: Path, text: str) -> None:
    (copy / HALVES / "test.txt").write_text(text, encoding="utf-8", newline="")
    (copy / HALVES / "train.txt").write_text("CF1.jpg 5\n")
    (split,) = read_splits(copy, "60-40")
    assert [image.name for image in split.test.images] == ["AF1.jpg", "AM1.jpg"]
    assert split.test.ratings.tolist() == [3.5, 1.0]


def test_a_test_image_among_the_training_images_is_refused(copy: Path) -> None:
    train = copy / HALVES / "train.txt"
    leaked = (copy / HALVES / "test.txt").read_text().splitlines()[0]
    train.write_text(train.read_text() + leaked + "\n")
    with pytest.raises(
        MDNetError, match=rf"test.txt: 1 test images are also in train.txt, such as {leaked.split()[0]}"
    ):
        read_splits(copy, "60-40")


def test_an_image_in_two_test_folds_is_refused(copy: Path) -> None:
    def lines(part: str, fold: int) -> tuple[Path, list[str]]:
        file = copy / FOLDS / f"cross_validation_{fold}" / f"{part}_{fold}.txt"
        return file, file.read_text().splitlines()

    _, first = lines("test", 1)
    train, training = lines("train", 3)
    test, testing = lines("test", 3)
    train.write_text("\n".join(line for line in training if line != first[0]))
    test.write_text("\n".join([*testing, first[0]]))
    with pytest.raises(
        MDNetError, match=rf"test_3.txt: 1 test images are also in test_1.txt, such as {first[0].split()[0]}"
    ):
        read_splits(copy, "cv5")


def test_a_fold_without_one_of_the_images_is_refused(copy: Path) -> None:
    train = copy / FOLDS / "cross_validation_2" / "train_2.txt"
    first, *others = train.read_text().splitlines()
    train.write_text("\n".join(others))
    with pytest.raises(
        MDNetError, match=rf"cross_validation_2: .* 1 are in only one of them, such as {first.split()[0]}"
    ):
        read_splits(copy, "cv5")


def test_missing_folds_are_named_and_counted(copy: Path) -> None:
    shutil.rmtree(copy / FOLDS / "cross_validation_4")
    with pytest.raises(MDNetError, match=r"train_4.txt is missing, and 1 more"):
        read_splits(copy, "cv5")
    assert read_splits(copy, "60-40")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder Images"):
        read_splits(tmp_path, "60-40")


def test_ratings_and_images_that_all_labels_gives_otherwise_are_noted(copy: Path) -> None:
    file = copy / "train_test_files" / "All_labels.txt"
    first, second, *others = file.read_text().splitlines()
    file.write_text("\n".join([f"{first.split()[0]} 4.987654", *others]))
    notes = departures(copy, "cv5", read_splits(copy, "cv5"))
    assert f"1 images are only in it or only in the cv5 lists, such as {second.split()[0]}" in notes[1]
    assert f"another rating than the cv5 lists for 1 images, such as {first.split()[0]}" in notes[2]
    file.unlink()
    assert "All_labels.txt is missing" in departures(copy, "cv5", read_splits(copy, "cv5"))[1]


def test_released_sizes_are_not_noted(copy: Path) -> None:
    whole = Split("60-40", _blank(3300), _blank(2200))
    assert not [note for note in departures(copy, "60-40", [whole]) if "not the released" in note]


def _blank(count: int) -> Rated:
    return Rated([Path(f"AF{n}.jpg") for n in range(count)], np.full(count, 3, np.float32))
