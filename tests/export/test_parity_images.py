"""The images of a build: which parity is measured on, which calibrate, and that the two never meet."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from mdnet.data.rated import Rated
from mdnet.data.source import open_data
from mdnet_calib.calibration_set import MIN_IMAGES, refuse_overlap
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import UsageError
from mdnet_export.parity_images import calibration_images, is_dataset, parity_images
from mdnet_rt.images.preprocess import load_image

LISTS = "train_test_files"
SPLIT = f"{LISTS}/split_of_60%training and 40%testing"
FOLDS = f"{LISTS}/5_folders_cross_validations_files"


def listed(file: Path) -> dict[str, float]:
    """A list of the data set, read without the code under test: name → rating."""
    return {name: float(rating) for name, rating in (line.split() for line in file.read_text().splitlines())}


# --- parity ---


def test_parity_takes_test_images_of_the_data_set_with_their_ratings(faces: Path) -> None:
    test = listed(faces / SPLIT / "test.txt")
    images = parity_images(faces, 64, 10)
    assert len(set(images.names)) == len(images.names) == 10
    assert images.names == [name for name in test if name in images.names]  # in the list's order
    assert images.ratings is not None
    np.testing.assert_allclose(images.ratings, [test[name] for name in images.names], atol=1e-6)
    np.testing.assert_array_equal(images.pixels, [load_image(faces / "Images" / name, 64) for name in images.names])
    assert images.source == "10 test images of faces"
    assert parity_images(faces, 64, 1000).names == list(test)


def test_images_of_a_folder_have_no_ratings(faces: Path) -> None:
    assert parity_images(faces / "Images", 64, 3).ratings is None


def test_drawn_faces_have_ratings_that_differ() -> None:
    images = parity_images(None, 64, 12)
    assert images.ratings is not None
    assert images.ratings.shape == (12,)
    assert images.ratings.std() > 0.2
    assert ((images.ratings >= 1) & (images.ratings <= 5)).all()
    fewer = parity_images(None, 64, 5)
    np.testing.assert_array_equal(fewer.pixels, images.pixels[:5])
    np.testing.assert_array_equal(fewer.ratings, images.ratings[:5])


# --- calibration ---


def test_drawn_faces_calibrate_that_parity_is_not_measured_on() -> None:
    calibration = calibration_images(None, 64, 32)
    assert calibration.pixels.shape == (32, 64, 64, 3)
    refuse_overlap(calibration, parity_images(None, 64, 64).pixels, "measured")
    assert calibration.digest == calibration_images(None, 64, 32).digest


@pytest.mark.parametrize(
    ("training", "train_list"),
    [
        (None, f"{SPLIT}/train.txt"),
        (Training(), f"{SPLIT}/train.txt"),
        (Training(protocol="60-40"), f"{SPLIT}/train.txt"),
        (Training(protocol="cv5", fold=3), f"{FOLDS}/cross_validation_3/train_3.txt"),
        (Training(protocol="cv5", fold=5), f"{FOLDS}/cross_validation_5/train_5.txt"),
    ],
)
def test_only_images_that_the_weights_learned_from_calibrate(
    training: Training | None, train_list: str, faces: Path
) -> None:
    train = listed(faces / train_list)
    some = calibration_images(faces, 64, 16, training=training)
    assert len(set(some.names)) == 16
    assert set(some.names) <= set(train)
    assert some.source == "16 training images of faces"
    groups = {group: sum(name.startswith(group) for name in some.names) for group in ("AF", "AM", "CF", "CM")}
    assert min(groups.values()) >= 1
    assert set(calibration_images(faces, 64, 1000, training=training).names) == set(train)


@pytest.fixture(scope="module")
def table(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 of the faces as a table, the last ten to be tested on, and the same without its splits."""
    folder = tmp_path_factory.mktemp("table")
    rows = sorted(listed(faces / LISTS / "All_labels.txt").items())[:40]
    lines = [f"{faces / 'Images' / name},{rating},{name[:2]}" for name, rating in rows]
    (folder / "plain.csv").write_text("\n".join(["image,rating,group", *lines]))
    parts = ["train"] * 30 + ["test"] * 10
    split = [f"{line},{part}" for line, part in zip(lines, parts, strict=True)]
    (folder / "ratings.csv").write_text("\n".join(["image,rating,group,split", *split]))
    return folder


def names_in(split: Rated) -> set[str]:
    return {image.name for image in split.images}


def test_only_training_images_of_a_table_calibrate(table: Path) -> None:
    (split,) = open_data(table).splits("split")
    found = calibration_images(table / "ratings.csv", 64, 1000)
    assert set(found.names) == names_in(split.train)
    assert found.source == "30 training images of ratings.csv"
    assert calibration_images(table, 64, 1000).digest == found.digest
    some = calibration_images(table, 64, 12)
    assert {name[:2] for name in some.names} == set(split.train.groups)


def test_of_a_table_that_the_weights_were_trained_on_their_fold_calibrates(table: Path) -> None:
    data = open_data(table / "plain.csv")
    fold = data.splits("kfold:4")[1]
    known = Training(protocol="kfold:4", fold=2, data="plain.csv", data_sha256=data.sha256)
    assert set(calibration_images(data.path, 64, 1000, training=known).names) == names_in(fold.train)
    other = known.model_copy(update={"data_sha256": "0" * 64})
    assert len(calibration_images(data.path, 64, 1000, training=other).names) == 40


def test_a_table_of_test_images_alone_calibrates_nothing(table: Path) -> None:
    file = table / "test-only.csv"
    file.write_text((table / "ratings.csv").read_text().replace(",train", ",test"))
    with pytest.raises(UsageError, match=r"test-only.csv has no picture to train on, so none to calibrate with"):
        calibration_images(file, 64, 16)


def test_parity_and_calibration_of_one_data_set_do_not_meet(faces: Path) -> None:
    refuse_overlap(calibration_images(faces, 64, 1000), parity_images(faces, 64, 1000).pixels, "measured")


@pytest.mark.parametrize("link", [False, True])
def test_the_data_sets_pictures_are_refused_without_its_lists(link: bool, faces: Path, tmp_path: Path) -> None:
    folder = faces / "Images"
    if link:
        (tmp_path / "mine").symlink_to(folder)
        folder = tmp_path / "mine"
    with pytest.raises(UsageError, match="test images of the benchmark among them; give the data set's own"):
        calibration_images(folder, 64, 16)


def test_a_folder_around_the_data_set_is_refused(faces: Path) -> None:
    with pytest.raises(UsageError, match="test images of the benchmark"):
        calibration_images(faces.parent, 64, 16)


def test_images_are_spread_over_a_folder(faces: Path, tmp_path: Path) -> None:
    for i, file in enumerate(sorted((faces / "Images").iterdir())[:23]):
        shutil.copy(file, tmp_path / f"{i:02}.jpg")
    (tmp_path / "00.jpg").write_text("no image")
    done = Recorded()
    found = calibration_images(tmp_path, 64, 12, progress=done)
    assert found.names == [f"{i:02}.jpg" for i in range(2, 24, 2)]
    assert (found.skipped, done.counts) == (1, [(12, [1] * 12)])
    assert not is_dataset(tmp_path)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--num-calib is 7; calibration needs at least 8 images$"):
        calibration_images(None, 64, MIN_IMAGES - 1)
    for i in range(5):
        Image.new("RGB", (80, 80), (i, i, i)).save(tmp_path / f"{i}.png")
    with pytest.raises(UsageError, match=r"has 5 usable images; calibration needs at least 8"):
        calibration_images(tmp_path, 64, 16)
