"""Any image → uint8 `[size, size, 3]` RGB: the one preprocessing of training, calibration, parity and serving.

In order: refuse what is too large to decode, decode (a JPEG at a reduced size that is still at least `JPEG_DRAFT`
times the size wanted), convert to 8-bit RGB on white, turn upright by EXIF, take the central square (or the one around
the face, turned so that its eyes are level) in a bicubic, antialiased resize, and convert its colours from the file's
profile to sRGB. Normalisation is inside the graphs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from mdnet_rt.images.colour import to_rgb
from mdnet_rt.images.decode import FORMATS, MAX_BYTES, MAX_PIXELS, ImageError, check_pixels, image_errors, open_image
from mdnet_rt.images.icc_profiles import Profile

__all__ = [
    "FORMATS",
    "JPEG_DRAFT",
    "MAX_BYTES",
    "MAX_PIXELS",
    "Box",
    "Decoded",
    "FindBox",
    "ImageError",
    "decode",
    "decode_in_memory",
    "load_image",
    "preprocess",
]

JPEG_DRAFT = 2
"""A JPEG's decoder may drop resolution down to this many times the output size, never below."""
_BICUBIC = Image.Resampling.BICUBIC
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Box(NamedTuple):
    """A square in an image, in pixels, turned about its centre."""

    left: float
    top: float
    right: float
    bottom: float
    degrees: float = 0.0
    """How far what it shows is turned clockwise in the image; it is turned back."""


FindBox: TypeAlias = Callable[[Image.Image], Box]
"""Which square to take of an upright RGB image. Raises `ImageError` where there is none."""


class Decoded(NamedTuple):
    """An image as the graphs take it, uint8 `[size, size, 3]` RGB, and the width and height that its file declares."""

    pixels: np.ndarray
    width: int
    height: int
    warning: str | None = None
    """What makes its score doubtful, in one line."""


def load_image(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    size: int,
    *,
    find_box: FindBox | None = None,
    to_srgb: bool = True,
) -> np.ndarray:
    """Decode and preprocess an image file, given as a path, as its bytes or as an open binary file.

    Of a file with several frames the first is taken.

    Args:
        find_box: which square to take in place of the central one: that of `mdnet_rt.images.face_crop.face_finder` for
            `Preprocessing.face` of a bundle's manifest. A JPEG is then decoded at its full size.
        to_srgb: whether a colour profile is applied (`Preprocessing.to_srgb`).

    Returns:
        uint8 `[size, size, 3]`, RGB.

    Raises:
        ImageError: unreadable, not an image, damaged, or larger than `MAX_PIXELS` or `MAX_BYTES`; or what `find_box`
            raises.
    """
    return decode(source, size, find_box=find_box, to_srgb=to_srgb).pixels


def decode(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    size: int,
    *,
    find_box: FindBox | None = None,
    to_srgb: bool = True,
    max_pixels: int | None = None,
    admit: Callable[[Image.Image, int], None] = lambda image, pixels: None,
) -> Decoded:
    """As `load_image`, with the size that the file declares, and a warning where its score is doubtful.

    Args:
        find_box, to_srgb: as `load_image`.
        max_pixels: the most that the file may declare; None means `MAX_PIXELS`.
        admit: called before pixels are decoded, with the opened image and how many its decoder will hold.

    Raises:
        ImageError: as `load_image`, and what `find_box` and `admit` raise.
    """
    with open_image(source, max_pixels=max_pixels) as image:
        width, height = image.size
        if find_box is None:
            # Square, so that it fits both orientations that EXIF may ask for. Does nothing unless it is a JPEG.
            image.draft(None, (JPEG_DRAFT * size, JPEG_DRAFT * size))
        # A progressive JPEG is held at its full size, whatever is made of it.
        admit(image, width * height if image.info.get("progressive") else image.width * image.height)
        return _decoded(image, (width, height), size, find_box, to_srgb)


def preprocess(
    image: Image.Image | np.ndarray, size: int, *, find_box: FindBox | None = None, to_srgb: bool = True
) -> np.ndarray:
    """Preprocess an image in memory: a PIL image of any mode, or uint8 `[H, W, 3]` RGB.

    A PIL image is taken at the size and with the colour profile it has, and is not changed. A JPEG much larger than
    `size` goes through `load_image` at a reduced decoding size, so its pixels may differ by a few levels from those of
    this function.

    Returns:
        uint8 `[size, size, 3]`, RGB.

    Raises:
        ImageError: an array of another type or shape, or a PIL image that `load_image` would refuse.
    """
    return decode_in_memory(image, size, find_box=find_box, to_srgb=to_srgb).pixels


def decode_in_memory(
    image: Image.Image | np.ndarray, size: int, *, find_box: FindBox | None = None, to_srgb: bool = True
) -> Decoded:
    """As `preprocess`, with the size that the image had, and a warning where its score is doubtful."""
    with image_errors():
        if not isinstance(image, Image.Image):
            image = _from_array(image)
        check_pixels(*image.size)
        return _decoded(image, image.size, size, find_box, to_srgb)


def _decoded(
    image: Image.Image, declared: tuple[int, int], size: int, find_box: FindBox | None, to_srgb: bool
) -> Decoded:
    image.load()  # first, since some formats (PNG, TIFF) learn their orientation only while decoding
    profile = Profile(image) if to_srgb else None
    pixels = _square(image, size, find_box or _centre, profile)
    warnings = [] if profile is None or profile.warning is None else [profile.warning]
    if _is_flat(pixels):
        warnings.append("one flat colour")
    return Decoded(pixels, *declared, "; ".join(warnings) or None)


def _is_flat(pixels: np.ndarray) -> bool:
    # Of a picture a few pixels tell, in a hundredth of the time that all of them take.
    return bool((pixels[::16, ::16] == pixels[0, 0]).all() and (pixels == pixels[0, 0]).all())


def _square(image: Image.Image, size: int, find_box: FindBox, profile: Profile | None) -> np.ndarray:
    orientation = _orientation(image)
    if not (profile and profile.keeps_cmyk):
        image = to_rgb(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    box = find_box(image if image.mode == "RGB" else image.convert("RGB"))
    # Crop and resize in one: nothing outside the square is resampled, however long the image is.
    square = _turned(image, size, box) if box.degrees else image.resize((size, size), _BICUBIC, box=box[:4])
    return np.array(profile.to_srgb(square) if profile else square)


def _turned(image: Image.Image, size: int, box: Box) -> Image.Image:
    """The square turned back, at `size`; where it reaches over the image's edge, the edge goes on.

    It is turned at twice the size, so that the second interpolation costs no detail.
    """
    angle = math.radians(box.degrees)
    around = 2 * math.ceil(size * (abs(math.cos(angle)) + abs(math.sin(angle))))  # side of the upright square around it
    scale = 2 * size / (box.right - box.left)
    x, y, reach = (box.left + box.right) / 2, (box.top + box.bottom) / 2, around / 2 / scale
    left, top, right, bottom = x - reach, y - reach, x + reach, y + reach
    # How many of its pixels lie outside on each side, where there are none to take.
    before, after = _outside(-left * scale, around), _outside((right - image.width) * scale, around)
    above, below = _outside(-top * scale, around), _outside((bottom - image.height) * scale, around)
    inside = (
        max(left + before / scale, 0),
        max(top + above / scale, 0),
        min(right - after / scale, image.width),
        min(bottom - below / scale, image.height),
    )
    part = image.resize((around - before - after, around - above - below), _BICUBIC, box=inside)
    if before or after or above or below:
        part = Image.fromarray(np.pad(np.asarray(part), ((above, below), (before, after), (0, 0)), "edge"), part.mode)
    edge = around // 2 - size
    turned = part.rotate(box.degrees, _BICUBIC)
    return turned.crop((edge, edge, around - edge, around - edge)).reduce(2)


def _outside(pixels: float, most: int) -> int:
    return min(max(math.ceil(pixels), 0), most - 1)


def _centre(image: Image.Image) -> Box:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def _from_array(array: object) -> Image.Image:
    if not isinstance(array, np.ndarray):
        raise ImageError(f"{type(array).__name__} is not an image; expected a PIL image or a uint8 array [H, W, 3]")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"expected a uint8 array [H, W, 3], got {array.dtype} {list(array.shape)}")
    if not array.size:
        raise ImageError("no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways and says nothing about the pixels, which are as stored
        return 1
