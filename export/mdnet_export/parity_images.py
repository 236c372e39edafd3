"""The images of a parity run and of calibration: a folder, SCUT-FBP5500, a table of ratings, or faces drawn here."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mdnet.data.draw_face import draw_face
from mdnet.data.drawn_set import rating
from mdnet.data.rated import Rated
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.data.source import RatedData, is_table, open_data
from mdnet_calib.calibration_set import MIN_IMAGES, CalibrationSet, load_set, stratified
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import UsageError
from mdnet_engines.parity.measure import Images
from mdnet_engines.parity.probes import PROBES
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.preprocess import ImageError, load_image, preprocess
from mdnet_rt.sources.locations import find_images

_SEED = 20_509  # not a seed of the training data
_CALIBRATION_SEED = 71_101  # nor of what parity is measured on


def parity_images(folder: Path | None, size: int, count: int) -> Images:
    """`count` preprocessed images of `size`: spread over the files below `folder`, or drawn.

    Of SCUT-FBP5500, given as its root, the test list of `60-40` is taken. Its images and drawn faces have ratings.

    Raises:
        UsageError: the folder holds no readable image, or `count` is not positive.
    """
    if count < 1:
        raise UsageError(f"--num-images is {count}; parity needs at least one image")
    if folder is None:
        pixels, ratings = _drawn(_SEED, size, count)
        return Images([f"drawn face {i}" for i in range(count)], pixels, f"{count} drawn faces", ratings)
    if is_dataset(folder):
        test = read_splits(folder, "60-40")[0].test
        test = test.take(np.array(_even(len(test), count)))
        pixels = np.stack([load_image(file, size) for file in test.images])
        source = f"{len(test)} test images of {folder.name}"
        return Images([file.name for file in test.images], pixels, source, test.ratings)
    names, arrays = [], []
    files = find_images([folder])
    for file in (files[i] for i in _even(len(files), count)):
        try:
            arrays.append(load_image(file, size))
        except ImageError:
            continue
        names.append(file.name)
    if not names:
        raise UsageError(f"{folder} holds no readable image")
    return Images(names, np.stack(arrays), f"{len(names)} images of {folder.name or folder}")


def probe_pixels(size: int) -> np.ndarray:
    """The drawn faces that prove a bundle wherever it runs, uint8 (n, S, S, 3); the drawn parity images begin so."""
    return _drawn(_SEED, size, PROBES)[0]


def calibration_images(
    folder: Path | None,
    size: int,
    count: int,
    *,
    training: Training | None = None,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """`count` images to calibrate with: drawn, spread over the files below `folder`, or of rated pictures.

    Of SCUT-FBP5500, given as its root, and of a table of ratings only the training list is used, of the protocol and
    fold that the weights were trained with; it is sampled so that every group and the range of ratings are covered.
    All pictures of a table without splits can be taken, unless the weights were trained on some of them.

    Raises:
        UsageError: too few images can be read, or the folder holds test images of SCUT-FBP5500.
        MDNetError: the table is wrong.
    """
    if count < MIN_IMAGES:
        raise UsageError(f"--num-calib is {count}; calibration needs at least {MIN_IMAGES} images")
    if folder is None:
        names = [f"drawn face {i}" for i in range(count)]
        return CalibrationSet(names, _drawn(_CALIBRATION_SEED, size, count)[0], f"{count} drawn faces")
    if is_dataset(folder) or is_table(folder):
        train = _training_list(open_data(folder), training, progress)
        rows = stratified(train.ratings, train.groups, count)
        source = f"{len(rows)} training images of {folder.name}"
        return load_set([train.images[row] for row in rows], size, source, progress=progress)
    files = find_images([folder])
    for parent in {file.resolve().parent.parent for file in files}:
        if is_dataset(parent):
            raise UsageError(
                f"{folder} has test images of the benchmark among them; give the data set's own folder ({parent}), "
                "of which only training images are used"
            )
    chosen = [files[i] for i in _even(len(files), count)]
    return load_set(chosen, size, f"{folder.name or folder}", progress=progress)


def is_dataset(folder: Path) -> bool:
    """Whether `folder` is the root of SCUT-FBP5500, or of drawn faces in its layout."""
    return (folder / "Images").is_dir() and (folder / "train_test_files").is_dir()


def _training_list(data: RatedData, training: Training | None, progress: Progress) -> Rated:
    """What the weights were trained on, as far as they say; else what the data's own protocol trains on."""
    protocol, fold = data.protocol(None, training=False), None
    if training is not None and training.protocol is not None and training.data_sha256 == data.sha256:
        protocol, fold = training.protocol, training.fold
    splits = data.splits(protocol, progress)
    chosen = next((split for split in splits if split.fold == fold), splits[0])
    train = chosen.test if protocol == "all" else chosen.train
    if not len(train):
        raise UsageError(f"{data.path} has no picture to train on, so none to calibrate with")
    return train


def _drawn(seed: int, size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed drawn faces (count, size, size, 3), and their ratings (count,)."""
    pixels, ratings = [], []
    for i in range(count):
        random = np.random.default_rng([seed, i])
        face, factors = draw_face(random)
        pixels.append(preprocess(face, size))
        ratings.append(rating(factors, random))
    return np.stack(pixels), np.array(ratings)


def _even(length: int, count: int) -> list[int]:
    """`count` of `length` positions, evenly spaced."""
    if length <= count:
        return list(range(length))
    return [round(i * (length - 1) / max(count - 1, 1)) for i in range(count)]
