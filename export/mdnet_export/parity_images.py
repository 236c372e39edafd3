"""The images of a parity run and of calibration: a folder, SCUT-FBP5500, a table of ratings, or faces drawn here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mdnet.data.draw_face import draw_face
from mdnet.data.drawn_set import rating
from mdnet.data.rated import Rated, Split
from mdnet.data.source import RatedData, is_table, open_data
from mdnet_calib.calibration_set import MIN_IMAGES, CalibrationSet, load_set, stratified
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.errors import UsageError
from mdnet_engines.parity.gates import RATED_IMAGES
from mdnet_engines.parity.measure import Images
from mdnet_engines.parity.probes import PROBES
from mdnet_engines.progress import SILENT, Progress
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import ImageError, load_image, preprocess
from mdnet_rt.sources.locations import find_images

_SEED = 20_509  # not a seed of the training data
_CALIBRATION_SEED = 71_101  # nor of what parity is measured on


OWN_PICTURES = RATED_IMAGES
"""Of the user's pictures, how many parity is measured on: what a gate on ratings needs."""
MIN_HELD_OUT = 8
"""Fewer pictures of the user's show too little; drawn faces take their place."""
_SHARE = 4
"""Of few calibration pictures, one in so many is kept for the gates."""


@dataclass(frozen=True)
class Pictures:
    """The user's pictures that a build may choose from, with their ratings and groups where these are known."""

    name: str
    files: list[Path]
    rated: Rated | None = None

    def choose(self, count: int) -> list[int]:
        """Positions of `count` files: spread over the names, or over groups and ratings."""
        if self.rated is None:
            return _even(len(self.files), count)
        return stratified(self.rated.ratings, self.rated.groups, count)

    def besides(self, rows: list[int]) -> Pictures:
        """Those at other positions."""
        others = np.setdiff1d(np.arange(len(self.files)), rows)
        rated = None if self.rated is None else self.rated.take(others)
        return Pictures(self.name, [self.files[row] for row in others], rated)


def parity_images(
    folder: Path | None,
    size: int,
    count: int | None = None,
    *,
    face: float | None = None,
    training: Training | None = None,
    progress: Progress = SILENT,
) -> Images:
    """`count` preprocessed images of `size`: spread over the files below `folder`, or drawn.

    Of SCUT-FBP5500, given as its root, and of a table of ratings, test images are taken, of the protocol and fold that
    the weights were trained with. They have ratings and groups; drawn faces have ratings.

    Args:
        count: by default `OWN_PICTURES`, or of drawn faces `PROBES`.
        face: which square of a file is taken, as a manifest has it. Drawn faces are taken whole.

    Raises:
        UsageError: the folder holds no readable image, or `count` is not positive.
        MDNetError: the table is wrong.
    """
    _check_count(count)
    if folder is None:
        count = PROBES if count is None else count
        pixels, ratings = _drawn(_SEED, size, count)
        return Images([f"drawn face {i}" for i in range(count)], pixels, f"{count} drawn faces", ratings)
    count, name = OWN_PICTURES if count is None else count, folder.name or str(folder)
    if is_dataset(folder) or is_table(folder):
        test = _split(open_data(folder), training, progress)[1].test
        if not len(test):
            raise UsageError(f"{folder} has no test picture to measure parity on")
        images = _read(Pictures(name, test.images, test), _even(len(test), count), size, face, "test images")
    else:
        files = find_images([folder])
        images = _read(Pictures(name, files), _even(len(files), count), size, face, "images")
    if images is None:
        raise UsageError(f"{folder} holds no readable image")
    return images


def hold_out(
    pictures: Pictures, size: int, count: int | None = None, *, face: float | None = None
) -> tuple[Images | None, Pictures]:
    """Of the user's pictures, some to measure parity on, and those that are left to calibrate with.

    A quarter of them at most, and `count` (`OWN_PICTURES`); the same ones each time. None where the quarter is below
    `MIN_HELD_OUT`: then all are left.

    Args:
        face: as `parity_images`.

    Raises:
        UsageError: `count` is not positive.
    """
    _check_count(count)
    share = len(pictures.files) // _SHARE
    if share < MIN_HELD_OUT:
        return None, pictures
    rows = pictures.choose(min(OWN_PICTURES if count is None else count, share))
    words = "images" if pictures.rated is None else "training images"
    return _read(pictures, rows, size, face, words, ", none of which calibrated"), pictures.besides(rows)


def own_pictures(folder: Path, *, training: Training | None = None, progress: Progress = SILENT) -> Pictures:
    """The pictures below `folder`; of SCUT-FBP5500 and of a table of ratings the training list.

    That is the list of the protocol and fold that the weights were trained with. All pictures of a table without splits
    can be taken, unless the weights were trained on some of them.

    Raises:
        UsageError: the folder holds no image, or test images of SCUT-FBP5500.
        MDNetError: the table is wrong.
    """
    name = folder.name or str(folder)
    if is_dataset(folder) or is_table(folder):
        train = _training_list(open_data(folder), training, progress)
        return Pictures(name, train.images, train)
    files = find_images([folder])
    for parent in {file.resolve().parent.parent for file in files}:
        if is_dataset(parent):
            raise UsageError(
                f"{folder} has test images of the benchmark among them; give the data set's own folder ({parent}), "
                "of which only training images are used"
            )
    return Pictures(name, files)


def probe_pixels(size: int) -> np.ndarray:
    """The drawn faces that prove a bundle wherever it runs, uint8 (n, S, S, 3); the drawn parity images begin so."""
    return _drawn(_SEED, size, PROBES)[0]


def calibration_images(
    source: Path | Pictures | None,
    size: int,
    count: int,
    *,
    face: float | None = None,
    training: Training | None = None,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """`count` images to calibrate with: drawn, or of the user's pictures (a path is read by `own_pictures`).

    Args:
        face: as `parity_images`.

    Raises:
        UsageError: too few images can be read; or as `own_pictures`.
        MDNetError: as `own_pictures`.
    """
    if count < MIN_IMAGES:
        raise UsageError(f"--num-calib is {count}; calibration needs at least {MIN_IMAGES} images")
    if source is None:
        names = [f"drawn face {i}" for i in range(count)]
        return CalibrationSet(names, _drawn(_CALIBRATION_SEED, size, count)[0], f"{count} drawn faces")
    pictures = source if isinstance(source, Pictures) else own_pictures(source, training=training, progress=progress)
    files = [pictures.files[row] for row in pictures.choose(count)]
    described = pictures.name if pictures.rated is None else f"{len(files)} training images of {pictures.name}"
    return load_set(files, size, described, face=face, progress=progress)


def is_dataset(folder: Path) -> bool:
    """Whether `folder` is the root of SCUT-FBP5500, or of drawn faces in its layout."""
    return (folder / "Images").is_dir() and (folder / "train_test_files").is_dir()


def _split(data: RatedData, training: Training | None, progress: Progress) -> tuple[str, Split]:
    """The protocol and split that the weights were trained with, as far as they say; else the data's own first one."""
    protocol, fold = data.protocol(None, training=False), None
    if training is not None and training.protocol is not None and training.data_sha256 == data.sha256:
        protocol, fold = training.protocol, training.fold
    splits = data.splits(protocol, progress)
    return protocol, next((split for split in splits if split.fold == fold), splits[0])


def _training_list(data: RatedData, training: Training | None, progress: Progress) -> Rated:
    protocol, chosen = _split(data, training, progress)
    train = chosen.test if protocol == "all" else chosen.train
    if not len(train):
        raise UsageError(f"{data.path} has no picture to train on, so none to calibrate with")
    return train


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise UsageError(f"--num-images is {count}; parity needs at least one image")


def _read(
    pictures: Pictures, rows: list[int], size: int, face: float | None, words: str, more: str = ""
) -> Images | None:
    """The pictures at `rows` that can be used; None where none can."""
    good, arrays = [], []
    for row in rows:
        try:
            arrays.append(load_image(pictures.files[row], size, find_box=face_finder(face)))
        except ImageError:
            continue
        good.append(row)
    if not good:
        return None
    rated = None if pictures.rated is None else pictures.rated.take(np.array(good))
    return Images(
        [pictures.files[row].name for row in good],
        np.stack(arrays),
        f"{len(good)} {words} of {pictures.name}{more}",
        None if rated is None else rated.ratings,
        None if rated is None else rated.groups,
        private=True,
    )


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
