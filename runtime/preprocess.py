"""Any image → uint8 `[size, size, 3]` RGB: the one preprocessing of training, calibration, parity and serving.

In order: refuse what is too large to decode, decode (a JPEG at a reduced size that is still at least `JPEG_DRAFT`
times the size wanted), convert to 8-bit RGB on white, turn upright by EXIF, and take the central square (or another
one that is asked for) in one bicubic, antialiased resize. Normalisation is inside the graphs. Colour profiles are not
applied.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from mdnet_engines.errors import MDNetError, first_line

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (where Pillow starts to warn: 256 MiB of 8-bit RGB)."""
MAX_BYTES = 256 * 2**20
"""Larger files are refused: some decoders search byte by byte for where an image goes on, or read all of it first."""
JPEG_DRAFT = 2
"""A JPEG's decoder may drop resolution down to this many times the output size, never below."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""What is decoded. A list of our own, since Pillow's own reaches programs (EPS runs Ghostscript)."""

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


Box: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom of a square in an image, in pixels."""
FindBox: TypeAlias = Callable[[Image.Image], Box]
"""Which square to take of an upright RGB image. Raises `ImageError` where there is none."""


class ImageError(MDNetError):
    """One image that can't be used; the message is a short reason without the image's name."""

    status = "unreadable"
    """What a result row says of it."""


class Decoded(NamedTuple):
    """An image as the graphs take it, uint8 `[size, size, 3]` RGB, and the width and height that its file declares."""

    pixels: np.ndarray
    width: int
    height: int


def load_image(source: str | os.PathLike[str] | bytes | BinaryIO, size: int) -> np.ndarray:
    """Decode and preprocess an image file, given as a path, as its bytes or as an open binary file.

    Of a file with several frames the first is taken.

    Returns:
        uint8 `[size, size, 3]`, RGB.

    Raises:
        ImageError: unreadable, not an image, damaged, or larger than `MAX_PIXELS` or `MAX_BYTES`.
    """
    return decode(source, size).pixels


def decode(source: str | os.PathLike[str] | bytes | BinaryIO, size: int, *, find_box: FindBox | None = None) -> Decoded:
    """As `load_image`, with the size that the file declares.

    Args:
        find_box: which square to take in place of the central one. A JPEG is then decoded at its full size.

    Raises:
        ImageError: as `load_image`, and what `find_box` raises.
    """
    with _image_errors(), _binary(source) as stream, _open(stream) as image:
        width, height = image.size
        _check_pixels(width, height)
        if find_box is None:
            # Square, so that it holds for both orientations that EXIF may ask for. Does nothing where it is not a JPEG.
            image.draft(None, (JPEG_DRAFT * size, JPEG_DRAFT * size))
        return Decoded(_square(image, size, find_box or _centre), width, height)


def preprocess(image: Image.Image | np.ndarray, size: int, *, find_box: FindBox | None = None) -> np.ndarray:
    """Preprocess an image in memory: a PIL image of any mode, or uint8 `[H, W, 3]` RGB.

    A PIL image is taken at the size it has and is not changed. A JPEG much larger than `size` goes through
    `load_image` at a reduced decoding size, so its pixels may differ by a few levels from those of this function.

    Returns:
        uint8 `[size, size, 3]`, RGB.

    Raises:
        ImageError: an array of another type or shape, or a PIL image that `load_image` would refuse.
    """
    with _image_errors():
        if not isinstance(image, Image.Image):
            image = _from_array(image)
        _check_pixels(*image.size)
        return _square(image, size, find_box or _centre)


def _square(image: Image.Image, size: int, find_box: FindBox) -> np.ndarray:
    image.load()  # first, since some formats (PNG, TIFF) learn their orientation only while decoding
    orientation = _orientation(image)
    image = _to_rgb(image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    # Crop and resize in one: nothing outside the square is resampled, however long the image is.
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=find_box(image)))


def _centre(image: Image.Image) -> Box:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (Pillow's own conversion clips). Mode `I` is how Pillow opens some of it."""
    pixels = np.asarray(image)
    if image.mode == "I" and (pixels.min() < 0 or pixels.max() > 0xFFFF):
        raise ImageError("32-bit integer pixels have no known range; save it with 8 or 16 bits")
    # The high byte is what Pillow keeps of 16-bit RGB: a grey image scores the same saved either way.
    return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")


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


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS}")
    if not width * height:
        raise ImageError("no pixels")


def too_large(size: int, limit: int = MAX_BYTES) -> str:
    """Why a file of `size` bytes is refused."""
    return f"{size} bytes exceed the limit of {limit}"


@contextlib.contextmanager
def _binary(source: str | os.PathLike[str] | bytes | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise ImageError("empty file")
        yield io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")  # to open a FIFO would wait for a writer for ever
        if not status.st_size:
            raise ImageError("empty file")
        if status.st_size > MAX_BYTES:
            raise ImageError(too_large(status.st_size))
        with path.open("rb") as stream:
            yield stream
    elif hasattr(source, "read"):
        yield source
    else:
        raise ImageError(f"{type(source).__name__} is not a path, bytes or a binary file")


def _open(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit (an error at twice ours, a warning at ours) leaves out the width and height.
        _check_pixels(*_declared_size(stream))
        raise


def _declared_size(stream: BinaryIO) -> tuple[int, int]:
    """Width and height by the file's header, without Pillow's own limit and without decoding."""
    stream.seek(0)
    prefix = stream.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            with contextlib.suppress(SyntaxError):  # how a plugin says "not mine"
                return factory(stream, "").size
    raise UnidentifiedImageError


@contextlib.contextmanager
def _image_errors() -> Iterator[None]:
    """Turn whatever reading and decoding raise into `ImageError` with a short reason."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image ({', '.join(FORMATS)})") from None
    except MemoryError as error:
        raise ImageError("not enough memory to decode it") from error
    except OSError as error:
        raise ImageError(_explain(error)) from error
    except Exception as error:  # on damaged data Pillow's decoders raise nearly every class there is
        raise ImageError(f"damaged ({first_line(error)[:200]})") from error


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "no such file"
    if error.errno is not None:
        return (error.strerror or os.strerror(error.errno)).lower()
    text = first_line(error)[:200]  # Pillow's own, of which one is common enough for a name
    if "truncated" in text.lower():
        return f"truncated ({text.removeprefix('image file is truncated').strip(' ()') or text})"
    return f"damaged ({text})"
