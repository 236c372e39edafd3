"""Open an image file, wherever it is, in the formats and within the limits there are; what fails is an `ImageError`."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError, features

from mdnet_engines.errors import MDNetError, first_line
from mdnet_rt.images import png

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded (where Pillow starts to warn: 256 MiB of 8-bit RGB)."""
MAX_BYTES = 256 * 2**20
"""Larger files are refused: some decoders search byte by byte for the next part, or read the whole file first."""
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
"""What is decoded. A list of our own, since Pillow's own reaches programs (EPS runs Ghostscript)."""
_HEIF = "HEIF"
"""Decoded too where the extra `heif` is installed."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class ImageError(MDNetError):
    """One image that can't be used; the message is a short reason without the image's name."""

    status = "unreadable"
    """What a result row says of it."""


@contextlib.contextmanager
def open_image(
    source: str | os.PathLike[str] | bytes | BinaryIO, *, max_pixels: int | None = None
) -> Iterator[Image.Image]:
    """Open an image file, given as a path, as its bytes or as an open binary file. Its pixels are not decoded yet.

    Args:
        max_pixels: the limit; None means `MAX_PIXELS`.

    Raises:
        ImageError: unreadable, not an image, or larger than `max_pixels` or `MAX_BYTES`; and in place of whatever
            else the block raises.
    """
    with image_errors(), _binary(source) as stream:
        prefix = _prefix(stream)
        if size := _webp_size(prefix):  # Pillow makes room for all pixels of a WebP when it opens one
            check_pixels(*size, max_pixels)
        with _open(stream, prefix) as image:
            check_pixels(*image.size, max_pixels)
            yield image


@contextlib.contextmanager
def image_errors() -> Iterator[None]:
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


def check_pixels(width: int, height: int, limit: int | None = None) -> None:
    """Raise `ImageError` if an image has no pixels, or more than `limit` (None means `MAX_PIXELS`)."""
    limit = MAX_PIXELS if limit is None else limit
    if width * height > limit:
        raise ImageError(f"{width}x{height} pixels exceed the limit of {limit}")
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
        yield source if source.seekable() else io.BytesIO(source.read())
    else:
        raise ImageError(f"{type(source).__name__} is not a path, bytes or a binary file")


def _open(stream: BinaryIO, prefix: bytes) -> Image.Image:
    if prefix.startswith(png.SIGNATURE):
        stream, profile_lost = png.without_baggage(stream)
        image = _open_any(stream)
        if profile_lost:
            image.info["icc_profile"] = None
        return image
    return _open_any(stream)


def _open_any(stream: BinaryIO) -> Image.Image:
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        return _open_other(stream, _prefix(stream))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit (an error at twice ours, a warning at ours) leaves out the width and height.
        check_pixels(*_declared_size(stream))
        raise


def _open_other(stream: BinaryIO, prefix: bytes) -> Image.Image:
    """Open what Pillow itself can't, or say more of it than that."""
    if prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        if importlib.util.find_spec("pi_heif") is None:
            raise ImageError("a HEIF image (iPhones write them); it can be decoded with the extra mdnet[heif]")
        from pi_heif import register_heif_opener

        register_heif_opener()
        return Image.open(stream, formats=[_HEIF])
    if prefix[4:12] in (b"ftypavif", b"ftypavis") and not features.check("avif"):
        raise ImageError("an AVIF image, but this Pillow was built without AVIF; install its wheel from PyPI")
    if prefix.startswith(_TIFF):
        raise ImageError("a TIFF that is damaged or has pixels of an unknown layout; save it with 8 bits")
    raise UnidentifiedImageError


def _prefix(stream: BinaryIO) -> bytes:
    stream.seek(0)
    return stream.read(32)


def _webp_size(prefix: bytes) -> tuple[int, int] | None:
    """Width and height by a WebP's header (RFC 9649, section 2); None for another format."""
    if prefix[:4] != b"RIFF" or prefix[8:12] != b"WEBP" or len(prefix) < 30:
        return None
    little = functools.partial(int.from_bytes, byteorder="little")
    match prefix[12:16]:
        case b"VP8X":
            return little(prefix[24:27]) + 1, little(prefix[27:30]) + 1
        case b"VP8L":
            bits = little(prefix[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            return little(prefix[26:28]) & 0x3FFF, little(prefix[28:30]) & 0x3FFF
    return None


def _declared_size(stream: BinaryIO) -> tuple[int, int]:
    """Width and height by the file's header, without Pillow's own limit and without decoding."""
    prefix = _prefix(stream)[:16]
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            with contextlib.suppress(SyntaxError):  # how a plugin says "not mine"
                return factory(stream, "").size
    raise UnidentifiedImageError


def _explain(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "no such file"
    if error.errno is not None:
        return (error.strerror or os.strerror(error.errno)).lower()
    text = first_line(error)[:200]  # Pillow's own, of which one is common enough for a name
    if "truncated" in text.lower():
        return f"truncated ({text.removeprefix('image file is truncated').strip(' ()') or text})"
    return f"damaged ({text})"
