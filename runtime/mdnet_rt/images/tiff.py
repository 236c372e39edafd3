"""What Pillow misreads in a TIFF, known by the file's tags: refused, or a rule for putting it right."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from mdnet_rt.images.decode import ImageError

_SUBFILE, _BITS, _PHOTOMETRIC, _PLANAR, _EXTRA, _FORMAT = 254, 258, 262, 284, 338, 339
_PREVIEW = 1
_SIGNED = 2


class Grey(NamedTuple):
    """How to read grey values of more than 8 bits: how many are used, and whether 0 is white."""

    bits: int = 16
    white_is_zero: bool = False


def refuse_misread(image: Image.Image) -> None:
    """Raise `ImageError` where Pillow, without a word, gives other pixels than those that are meant.

    The first image of a camera's raw file is a preview. The bytes of signed values are taken for unsigned ones, and
    those of uncompressed planes (all red, then all green) for 8 bits each.
    """
    if not isinstance(image, TiffImageFile):
        return
    tags = image.tag_v2
    if tags.get(_SUBFILE, 0) & _PREVIEW:
        raise ImageError("a preview comes first in this file (a camera's raw file?); convert it to JPEG or TIFF")
    if _SIGNED in tags.get(_FORMAT, ()) and max(tags.get(_BITS, (1,))) <= 16:
        raise ImageError("signed pixels have no known range; save it with 8 or 16 bits, unsigned")
    if tags.get(_PLANAR) == 2 and image.info.get("compression") == "raw" and len(image.getbands()) > 1:
        unnamed_alpha = image.mode == "RGBA" and _EXTRA not in tags
        if max(tags.get(_BITS, (1,))) > 8 or unnamed_alpha:
            raise ImageError("a TIFF with one plane for each colour; save it with interleaved pixels, or compressed")


def grey_of(image: Image.Image) -> Grey:
    """How the grey values of an image in one of Pillow's modes of 16 bits are to be read."""
    if not isinstance(image, TiffImageFile):
        return Grey()
    return Grey(12 if image.tag_v2.get(_BITS) == (12,) else 16, image.tag_v2.get(_PHOTOMETRIC) == 0)
