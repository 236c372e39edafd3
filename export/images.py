"""The images of a parity run: a folder of the user's, or drawn faces made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mdnet.faces import draw_face
from mdnet_engines.errors import UsageError
from mdnet_export.parity import Images
from mdnet_rt.preprocess import ImageError, load_image, preprocess
from mdnet_rt.sources import find_images

_SEED = 20_509  # not a seed of the training data


def parity_images(folder: Path | None, size: int, count: int) -> Images:
    """`count` preprocessed images of `size`: spread over the files below `folder`, or drawn.

    Raises:
        UsageError: the folder holds no readable image, or `count` is not positive.
    """
    if count < 1:
        raise UsageError(f"--num-images is {count}; parity needs at least one image")
    if folder is None:
        faces = [draw_face(np.random.default_rng([_SEED, i]))[0] for i in range(count)]
        pixels = np.stack([preprocess(face, size) for face in faces])
        return Images([f"drawn face {i}" for i in range(count)], pixels, f"{count} drawn faces")
    names, arrays = [], []
    for file in _spread(find_images([folder]), count):
        try:
            arrays.append(load_image(file, size))
        except ImageError:
            continue
        names.append(file.name)
    if not names:
        raise UsageError(f"{folder} holds no readable image")
    return Images(names, np.stack(arrays), f"{len(names)} images of {folder.name or folder}")


def _spread(files: Sequence[Path], count: int) -> list[Path]:
    """`count` of the files, evenly spaced over their order."""
    if len(files) <= count:
        return list(files)
    return [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
