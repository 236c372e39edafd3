"""TIFF in every layout: the pixels that were stored, or a reason; never others."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from tiffs import tiff

from mdnet_rt.images.preprocess import ImageError, load_image, preprocess

SIZE = 32
RGB = np.random.default_rng(0).integers(0, 256, (70, 50, 3), np.uint8)
GREY = RGB[:, :, 0]
CMYK = np.dstack([255 - RGB, np.zeros_like(GREY)])
RGBA = np.dstack([RGB, np.full_like(GREY, 255)])

layout = pytest.mark.parametrize("order", ["<", ">"])
stored = pytest.mark.parametrize(
    "options",
    [{}, {"deflate": True}, {"tile": 16}, {"tile": 16, "deflate": True}],
    ids=["strip", "strip-deflate", "tiles", "tiles-deflate"],
)


def wide(pixels: np.ndarray) -> np.ndarray:
    """The same in 16 bits."""
    return pixels.astype(np.uint16) * 257


def expected(pixels: np.ndarray) -> np.ndarray:
    return preprocess(np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels, SIZE)


@layout
@stored
def test_grey_of_8_and_16_bits_is_as_stored(order: str, options: dict[str, object]) -> None:
    for pixels in (GREY, wide(GREY)):
        np.testing.assert_array_equal(load_image(tiff(pixels, order=order, **options), SIZE), expected(GREY))


@stored
@pytest.mark.parametrize("bits", [8, 16])
def test_where_0_is_white_the_picture_is_no_negative(options: dict[str, object], bits: int) -> None:
    pixels = 255 - GREY if bits == 8 else 0xFFFF - wide(GREY)
    np.testing.assert_array_equal(load_image(tiff(pixels, photometric=0, **options), SIZE), expected(GREY))


def test_12_bits_are_scaled_as_16_are() -> None:
    # Of two values, the first fills a byte and half of the next, with its high bits first.
    first, second = (wide(GREY)[:, half::2] >> 4 for half in (0, 1))
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).reshape(70, -1)
    np.testing.assert_array_equal(load_image(tiff(packed.astype(np.uint8), bits=12, width=50), SIZE), expected(GREY))


@layout
@stored
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        (RGB, {}),
        (wide(RGB), {}),
        (RGBA, {"alpha": True}),
        (wide(RGBA), {"alpha": True}),
        (RGBA, {}),
        (CMYK, {"photometric": 5}),
        (wide(CMYK), {"photometric": 5}),
    ],
    ids=["rgb", "rgb16", "rgba", "rgba16", "rgba-unnamed", "cmyk", "cmyk16"],
)
def test_colours_are_as_stored_or_refused_with_a_way_out(
    order: str, options: dict[str, object], planar: bool, pixels: np.ndarray, tags: dict[str, object]
) -> None:
    data = tiff(pixels, order=order, planar=planar, **options, **tags)
    try:
        found = load_image(data, SIZE)
    except ImageError as error:
        assert planar  # nothing else is refused
        assert "deflate" not in options
        assert "save it with interleaved pixels" in str(error)
    else:
        np.testing.assert_array_equal(found, expected(RGB))


@layout
@stored
@pytest.mark.parametrize(
    "pixels",
    [(GREY.astype(int) - 128).astype(np.int8), (GREY.astype(np.int16) * 128), (wide(GREY) - 2**15).astype(np.int16)],
    ids=["int8", "int16-positive", "int16"],
)
def test_signed_pixels_are_refused(order: str, options: dict[str, object], pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match="signed pixels have no known range"):
        load_image(tiff(pixels, order=order, sample_format=2, **options), SIZE)


@layout
@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("pixels", [GREY, RGB], ids=["grey", "rgb"])
def test_floating_point_pixels_are_refused_as_a_tiff(order: str, kind: type, pixels: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"floating-point pixels|a TIFF .* save it with 8 bits"):
        load_image(tiff((pixels / 255).astype(kind), order=order, sample_format=3), SIZE)


def test_an_opened_tiff_in_memory_is_read_as_its_file() -> None:
    with Image.open(io.BytesIO(tiff(0xFFFF - wide(GREY), photometric=0))) as image:
        np.testing.assert_array_equal(preprocess(image, SIZE), expected(GREY))


def test_the_preview_of_a_raw_file_is_not_taken_for_the_picture() -> None:
    with pytest.raises(ImageError, match="a preview comes first"):
        load_image(tiff(RGB, preview=True), SIZE)
