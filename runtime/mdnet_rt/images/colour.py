"""Pixels of any mode and depth → 8-bit RGB on white."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mdnet_rt.images.decode import ImageError
from mdnet_rt.images.tiff import grey_of, refuse_misread


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB, 8 bits, what is transparent on white.

    Alpha that is 0 everywhere was never set (a 32-bit BMP's fourth byte, for one): the picture is opaque.

    Raises:
        ImageError: floating-point, signed or 32-bit pixels, of which nobody knows which value is white; a TIFF that
            Pillow misreads.
    """
    refuse_misread(image)
    if image.mode == "F":
        raise ImageError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        image = _with_key_of_8_bits(image).convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits (Pillow's own conversion clips). Mode `I` is how Pillow opens some of it."""
    pixels = np.asarray(image)
    if image.mode == "I" and (pixels.min() < 0 or pixels.max() > 0xFFFF):
        raise ImageError("32-bit integer pixels have no known range; save it with 8 or 16 bits")
    bits, white_is_zero = grey_of(image)
    # The high byte is what Pillow keeps of 16-bit RGB: a grey image scores the same saved either way.
    grey = (pixels >> (bits - 8)).astype(np.uint8)
    grey = 255 - grey if white_is_zero else grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[pixels == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _with_key_of_8_bits(image: Image.Image) -> Image.Image:
    """Of a PNG of 16-bit RGB Pillow keeps the pixels' high bytes, but both bytes of the colour that is transparent."""
    key = image.info.get("transparency")
    if image.mode != "RGB" or not isinstance(key, tuple) or max(key) <= 0xFF:
        return image
    image = image.copy()
    image.info["transparency"] = tuple(value >> 8 for value in key)
    return image
