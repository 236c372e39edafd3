"""The images of a build: which parity is measured on, which calibrate, and that the two never meet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recorded import Recorded

from mdnet.data.rated import Rated
from mdnet.data.source import open_data
from mdnet_calib.calibration_set import MIN_IMAGES, refuse_overlap
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import UsageError
from mdnet_engines.parity.measure import Images
from mdnet_export.cli.calibration import choose_images
from mdnet_export.model_source import choose_weights
from mdnet_export.parity_images import calibration_images, hold_out, is_dataset, own_pictures, parity_images
from mdnet_export.quantise import Calibration
from mdnet_rt.images.face_crop import face_finder
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
    assert images.groups == [name[:2] for name in images.names]
    assert parity_images(faces, 64, 1000).names == list(test)


def test_files_are_framed_as_in_training_and_drawn_faces_taken_whole(portraits: Path) -> None:
    images = parity_images(portraits, 64, 4, face=1.2)
    expected = [load_image(portraits / "Images" / name, 64, find_box=face_finder(1.2)) for name in images.names]
    np.testing.assert_array_equal(images.pixels, expected)
    calibration = calibration_images(portraits, 64, 8, face=1.2)
    first = load_image(portraits / "Images" / calibration.names[0], 64, find_box=face_finder(1.2))
    np.testing.assert_array_equal(calibration.pixels[0], first)
    np.testing.assert_array_equal(parity_images(None, 64, 2, face=1.2).pixels, parity_images(None, 64, 2).pixels)


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


# --- kept of the calibration pictures ---


def write_pictures(folder: Path, count: int) -> list[str]:
    """Pictures of noise, each another; their names in order."""
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i:03}.png")
    return [f"{i:03}.png" for i in range(count)]


@pytest.mark.parametrize(("files", "held"), [(31, 0), (32, 8), (64, 16), (403, 100), (500, 100)])
def test_a_quarter_of_the_pictures_is_kept_for_parity_and_at_most_100(files: int, held: int, tmp_path: Path) -> None:
    names = write_pictures(tmp_path / "mine", files)
    images, left = hold_out(own_pictures(tmp_path / "mine"), 64)
    kept = [] if images is None else images.names
    assert len(kept) == held
    assert sorted(kept + [file.name for file in left.files]) == names
    if images is not None:
        assert (kept[0], kept[-1]) == (names[0], names[-1])  # spread over all
        assert images.source == f"{held} images of mine, none of which calibrated"
        assert images.private
        again = hold_out(own_pictures(tmp_path / "mine"), 64)[0]
        assert again is not None
        assert again.names == kept
    refuse_overlap(calibration_images(left, 64, 1000), np.zeros((0,)) if images is None else images.pixels, "measured")


def test_fewer_are_kept_where_fewer_are_asked_for(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mine", 40)
    images, left = hold_out(own_pictures(tmp_path / "mine"), 64, 3)
    assert images is not None
    assert (len(images.names), len(left.files)) == (3, 37)
    with pytest.raises(UsageError, match="at least one image"):
        hold_out(left, 64, 0)


def test_of_a_data_set_training_images_are_kept_with_ratings_and_groups(faces: Path) -> None:
    train = listed(faces / SPLIT / "train.txt")
    images, left = hold_out(own_pictures(faces), 64, 16)
    assert images is not None
    assert set(images.names) | {file.name for file in left.files} == set(train)
    assert images.ratings is not None
    np.testing.assert_allclose(images.ratings, [train[name] for name in images.names], atol=1e-6)
    assert images.groups == [name[:2] for name in images.names]
    assert len(set(images.groups)) == 4
    assert "training images of faces, none of which calibrated" in images.source
    refuse_overlap(calibration_images(left, 64, 1000), images.pixels, "measured")


def choose(calib: Path, **options: Any) -> tuple[Images, Calibration]:
    given: dict[str, Any] = {"images": None, "num_images": None, "num_calib": 16, "k_centre": False} | options
    budget: dict[str, Any] = {"range_method": "percentile", "max_score_drift": None, "min_pearson": 0.9997}
    images, calibration = choose_images(
        choose_weights(), "int8", calib=calib, calib_cache=None, progress=Recorded(), **given, **budget
    )
    assert calibration is not None
    return images, calibration


def test_a_build_measures_parity_on_pictures_that_did_not_calibrate(tmp_path: Path) -> None:
    """One picture is there twice, by two names: it calibrates, and is not judged."""
    names = write_pictures(tmp_path / "mine", 48)
    pictures = own_pictures(tmp_path / "mine")
    held = hold_out(pictures, 128)[0]
    assert held is not None
    taken = choose(tmp_path / "mine")[1].images.names
    shutil.copy(tmp_path / "mine" / taken[0], tmp_path / "mine" / held.names[3])
    images, calibration = choose(tmp_path / "mine")
    assert calibration.images.names == taken
    assert images.names == [name for name in held.names if name != held.names[3]]
    assert set(images.names) | set(taken) < set(names)
    refuse_overlap(calibration.images, images.pixels, "measured")


def test_too_few_pictures_are_said_and_drawn_faces_take_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pictures(tmp_path / "mine", 20)
    images, calibration = choose(tmp_path / "mine")
    assert len(calibration.images.names) == 16
    assert images.source == "24 drawn faces: mine has too few pictures to keep some for the gates"
    assert not images.private
    assert "warning: mine has too few pictures" in capsys.readouterr().err


def test_images_that_were_named_are_measured_on_and_all_others_calibrate(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mine", 40)
    write_pictures(tmp_path / "others", 50)
    for i in range(50):
        (tmp_path / "others" / f"{i:03}.png").rename(tmp_path / "others" / f"b{i:03}.png")
    for i in range(40):
        (tmp_path / "others" / f"b{i:03}.png").unlink()
    images, calibration = choose(tmp_path / "mine", images=tmp_path / "others", num_calib=40)
    assert len(calibration.images.names) == 40
    assert images.source == "10 images of others"


def test_numbers_take_the_place_of_names() -> None:
    images = Images(["anna.jpg", "ben.jpg"], np.zeros((2, 8, 8, 3), np.uint8), "2 images of mine", private=True)
    assert images.without_names().names == ["picture 1", "picture 2"]


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
