"""Embedded ICC profiles → sRGB, by littlecms. It runs on the square that was cut out, not on all of a photograph."""

from __future__ import annotations

import functools
import io

from PIL import Image, ImageChops, ImageCms

MAX_PROFILE = 4 * 2**20
"""Bytes; those of printers, the largest in use, have about two million."""
KEY = "icc_profile"
"""Of `Image.info`. Pillow puts None there where it can't put a file's profile together."""
UNUSABLE = "unusable colour profile, taken as sRGB"
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")

# Relative colorimetric, with black as black: what image editors do by default.
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION


class Profile:
    """How the colours of one image become sRGB.

    Args:
        image: opened from a file, so that it has the file's profile; it is not changed.
    """

    def __init__(self, image: Image.Image):
        found = image.info.get(KEY)
        self._transform = _transform(found) if isinstance(found, bytes) and len(found) <= MAX_PROFILE else None
        if self._transform and not _fits(self._transform.input_mode, image):
            self._transform = None
        self.warning = UNUSABLE if KEY in image.info and self._transform is None else None
        """The remark about the image's colours."""

    @property
    def keeps_cmyk(self) -> bool:
        """Whether the image is to be cut and resized as CMYK, of which `to_srgb` makes RGB."""
        return self._transform is not None and self._transform.input_mode == "CMYK"

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Convert what became of the image: RGB, or CMYK where `keeps_cmyk`."""
        if self._transform is None:
            return image
        if self._transform.input_mode == "L":
            image = image.getchannel(0)
        return self._transform.apply(image)


def _fits(profile: str, image: Image.Image) -> bool:
    """Whether a profile for one mode can be that of an image of another: grey ones often keep their RGB profile."""
    if profile == "L":
        return image.mode in _GREY or (image.mode == "RGBA" and _is_grey(image))
    return (image.mode == "CMYK") == (profile == "CMYK")


def _is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue are the same: Pillow opens a PNG of grey and alpha, 16 bits each, as RGBA."""
    red, green, blue, _ = image.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


@functools.lru_cache(maxsize=8)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """The way from a profile to sRGB; None if it is damaged or not for images."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES[source.profile.xcolor_space.strip()]
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.ImageCmsTransform(source, ImageCms.ImageCmsProfile(srgb), mode, "RGB", _INTENT, flags=_FLAGS)
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return None
