"""Preprocessing: the same square of RGB whatever the file's format, and a reason for whatever is not an image."""

from __future__ import annotations

import builtins
import errno
import importlib.util
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, ImageOps, features
from pngs import png, transparent

from mdnet_rt.images import decode as image_files
from mdnet_rt.images import preprocess as module
from mdnet_rt.images.preprocess import (
    MAX_PIXELS,
    Box,
    Decoded,
    ImageError,
    decode,
    decode_in_memory,
    load_image,
    preprocess,
)

SIZE = 32
ORIENTATION = 0x0112


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(width: int, height: int) -> Image.Image:
    """Low frequencies, so that JPEG loses little, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 100 * np.sin(5 * x / width)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def bicubic(image: np.ndarray, size: int) -> np.ndarray:
    """Antialiased bicubic (Keys, a = −1/2) of the central square in float64."""

    def kernel(t: np.ndarray) -> np.ndarray:
        t = np.abs(t)
        near = 1.5 * t**3 - 2.5 * t**2 + 1
        far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        return np.where(t < 1, near, np.where(t < 2, far, 0))

    def matrix(length: int, side: int) -> np.ndarray:
        scale = side / size
        centers = (length - side) / 2 + (np.arange(size) + 0.5) * scale
        weights = kernel((np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1))
        return weights / weights.sum(1, keepdims=True)

    height, width, _ = image.shape
    side = min(height, width)
    return np.einsum("yh,xw,hwc->yxc", matrix(height, side), matrix(width, side), image.astype(np.float64))


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 100), (90, 41), (41, 90), (20, 20), (7, 30), (301, 64)])
def test_is_a_bicubic_resize_of_the_central_square(width: int, height: int) -> None:
    # Half the contrast, so that no overshoot is clipped between the axes, whose order Pillow chooses.
    image = noise(width, height) // 2 + 64
    # 2 levels: Pillow rounds its weights and, between the two axes, its pixels.
    np.testing.assert_allclose(preprocess(image, SIZE), bicubic(image, SIZE), atol=2)


@pytest.mark.parametrize("degrees", [0.5, -10, 45, 90, -137, 180])
@pytest.mark.parametrize(
    "square", [(60, 50, 140, 130), (0, 0, 60, 60), (150, 90, 200, 140), (0, 0, 150, 150), (3, 3, 4, 4)]
)
def test_a_turned_square_is_turned_back_and_the_images_edge_goes_on_outside(
    square: tuple[int, int, int, int], degrees: float
) -> None:
    """On a ramp, which every interpolation keeps."""
    width, height = 200, 150
    y, x = np.mgrid[0:height, 0:width] + 0.5
    ramp = np.stack([x, y, 0.5 * (x + y)], axis=2).astype(np.uint8)

    found = preprocess(ramp, SIZE, find_box=lambda image: Box(*square, degrees))

    left, top, right, bottom = square
    v, u = ((np.mgrid[0:SIZE, 0:SIZE] + 0.5) / SIZE - 0.5) * (right - left)
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    x = np.clip((left + right) / 2 + cosine * u - sine * v, 0, width)
    y = np.clip((top + bottom) / 2 + sine * u + cosine * v, 0, height)
    np.testing.assert_allclose(
        found, np.stack([x, y, 0.5 * (x + y)], axis=2), atol=5
    )  # of 200: half a pixel of the result


def test_path_bytes_file_pil_and_array_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = noise(70, 50)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    expected = preprocess(pixels, SIZE)
    assert expected.shape == (SIZE, SIZE, 3)
    assert expected.dtype == np.uint8
    with file.open("rb") as stream, Image.open(file) as image:
        for same in (load_image(stream, SIZE), preprocess(image, SIZE)):
            np.testing.assert_array_equal(same, expected)
    for source in (file, str(file), file.read_bytes()):
        np.testing.assert_array_equal(load_image(source, SIZE), expected)


def test_a_stream_that_cannot_seek_is_read(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(noise(40, 40)), "PNG")
    read, write = os.pipe()
    os.write(write, data)  # under the 64 KiB that a pipe holds
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        np.testing.assert_array_equal(load_image(stream, SIZE), load_image(data, SIZE))


def test_a_strided_array_is_taken_as_it_looks() -> None:
    pixels = noise(60, 60)
    flipped = pixels[:, ::-1]
    np.testing.assert_array_equal(preprocess(flipped, SIZE), preprocess(flipped.copy(), SIZE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_as_pillow_does(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(smooth(120, 90), format, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(load_image(data, SIZE), preprocess(np.asarray(upright), SIZE))
    assert upright.size == ((90, 120) if orientation > 4 else (120, 90))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_jpeg_is_turned_after_it_was_decoded_small(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = smooth(900, 600)
    data = encoded(image, "JPEG", quality=95, exif=exif)
    image.getexif()[ORIENTATION] = orientation
    # 4 levels: JPEG's own loss plus a reduced decoding; a wrong turn is off by up to 255.
    np.testing.assert_allclose(
        load_image(data, SIZE).astype(int), preprocess(ImageOps.exif_transpose(image), SIZE), atol=4
    )


@pytest.mark.parametrize(
    ("stored", "decoded"),
    [
        ((2000, 2000), (250, 250)),  # 1/8, the most a JPEG decoder reduces
        ((511, 700), (128, 175)),  # 1/8 would leave 64 columns but 511 // 8 is 63: one step less
        ((128, 128), (64, 64)),
        ((127, 127), (127, 127)),
        ((1000, 127), (1000, 127)),
        ((64, 3000), (64, 3000)),
        ((20, 20), (20, 20)),
    ],
)
def test_jpeg_is_decoded_small_but_never_under_twice_the_size(
    monkeypatch: pytest.MonkeyPatch, stored: tuple[int, int], decoded: tuple[int, int]
) -> None:
    seen = []
    monkeypatch.setattr(module, "_decoded", lambda image, *_: Decoded(seen.append(image.size), 0, 0))
    for oriented in (1, 6):
        exif = Image.Exif()
        exif[ORIENTATION] = oriented
        load_image(encoded(smooth(*stored), "JPEG", exif=exif), SIZE)
    assert seen == [decoded, decoded]


def test_a_pil_image_of_the_caller_is_not_changed() -> None:
    image = Image.open(io.BytesIO(encoded(smooth(900, 600), "JPEG")))
    preprocess(image, SIZE)
    assert image.size == (900, 600)
    assert image.mode == "RGB"


def test_damaged_exif_does_not_lose_the_image() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(smooth(60, 60), "JPEG", exif=exif)
    broken = data.replace(b"Exif\0\0MM", b"Exif\0\0ZZ").replace(b"Exif\0\0II", b"Exif\0\0ZZ")
    assert broken != data
    np.testing.assert_array_equal(load_image(broken, SIZE), load_image(encoded(smooth(60, 60), "JPEG"), SIZE))


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (40, 40), colour)


@pytest.mark.parametrize(
    ("image", "format", "rgb"),
    [
        (solid("L", 90), "PNG", (90, 90, 90)),
        (solid("1", 1), "PNG", (255, 255, 255)),
        (solid("1", 0), "TIFF", (0, 0, 0)),
        (solid("CMYK", (0, 0, 0, 0)), "JPEG", (255, 255, 255)),
        (solid("CMYK", (255, 0, 0, 0)), "JPEG", (0, 255, 255)),
        (solid("CMYK", (0, 0, 255, 0)), "TIFF", (255, 255, 0)),
        (solid("YCbCr", (100, 128, 128)), "JPEG", (100, 100, 100)),
        (solid("LA", (0, 0)), "PNG", (0, 0, 0)),
        (solid("LA", (0, 51)), "PNG", (204, 204, 204)),
        (solid("RGBA", (255, 0, 0, 0)), "PNG", (255, 0, 0)),
        (solid("RGBA", (255, 0, 0, 51)), "PNG", (255, 204, 204)),
        (solid("RGBA", (10, 20, 30, 255)), "WEBP", (10, 20, 30)),
        (solid("P", 3), "GIF", None),
    ],
    ids=lambda value: f"{value.mode}-{value.getpixel((0, 0))}" if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb_on_white(image: Image.Image, format: str, rgb: tuple[int, ...] | None) -> None:
    expected = np.array(rgb if rgb else image.convert("RGB").getpixel((0, 0)))
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = load_image(encoded(image, format, **options), SIZE).astype(int)
    # 2 levels: JPEG's colour conversion and the rounding of alpha
    assert np.abs(pixels - expected).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_palettes_transparent_colour_becomes_white(format: str) -> None:
    image = Image.new("P", (64, 64), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (32, 0, 64, 64))
    pixels = load_image(encoded(image, format, transparency=0), SIZE)
    np.testing.assert_array_equal(pixels[:, :12], 255)
    np.testing.assert_array_equal(pixels[:, 20:], np.broadcast_to([0, 0, 255], (SIZE, 12, 3)))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("key", [(0x20,), (0x20, 0x40, 0x60)], ids=["grey", "rgb"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_the_transparent_colour_of_a_png_becomes_white(kind: type, key: tuple[int, ...], in_memory: bool) -> None:
    pixels = np.full((SIZE, SIZE, len(key)), 0x80, kind)
    pixels[: SIZE // 2] = key
    if kind is np.uint16:
        pixels, key = pixels * 256 + 7, tuple(256 * value + 7 for value in key)
    data = png(pixels, transparent(*key))
    with Image.open(io.BytesIO(data)) as image:
        found = preprocess(image, SIZE) if in_memory else load_image(data, SIZE)
    assert (found[: SIZE // 2] == 255).all()
    assert (found[SIZE // 2 :] == 0x80).all()


def test_partly_transparent_palette_is_blended() -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0])
    pixels = load_image(encoded(image, "PNG", transparency=bytes([51])), SIZE)
    assert np.abs(pixels.astype(int) - 204).max() <= 1


def bmp_with_alpha(pixels: np.ndarray, alpha: int) -> bytes:
    """A BMP of 32 bits a pixel with masks for all four channels (BITMAPV3INFOHEADER)."""
    height, width, _ = pixels.shape
    body = np.dstack([pixels[::-1, :, ::-1], np.full((height, width), alpha, np.uint8)]).tobytes()
    header = struct.pack("<IiiHHIIiiII", 56, width, height, 1, 32, 3, len(body), 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    return struct.pack("<2sIHHI", b"BM", 70 + len(body), 0, 0, 70) + header + masks + body


def test_a_bmp_whose_alpha_was_never_set_is_opaque() -> None:
    pixels = noise(40, 30)
    assert Image.open(io.BytesIO(bmp_with_alpha(pixels, 0))).mode == "RGBA"
    np.testing.assert_array_equal(load_image(bmp_with_alpha(pixels, 0), SIZE), preprocess(pixels, SIZE))
    faint = load_image(bmp_with_alpha(pixels, 1), SIZE)  # which was set
    assert faint.min() >= 253


@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("PA", "TIFF")]
)
def test_alpha_that_is_0_everywhere_is_unset_and_alpha_that_is_set_anywhere_is_alpha(mode: str, format: str) -> None:
    opaque = Image.fromarray(noise(40, 40)[:, :, 0]).convert(mode[:-1])
    image = Image.merge("LA", (opaque, Image.new("L", (40, 40), 0))) if mode == "LA" else opaque.convert(mode)
    image.putalpha(0)
    np.testing.assert_array_equal(load_image(encoded(image, format), SIZE), preprocess(opaque, SIZE))
    alpha = Image.new("L", (40, 40), 0)
    alpha.putpixel((0, 0), 255)
    image.putalpha(alpha)
    np.testing.assert_array_equal(load_image(encoded(image, format), SIZE)[5:, 5:], 255)


@pytest.mark.parametrize("shape", [(40, 40), (3, 500)])
def test_a_picture_of_one_colour_has_a_warning_and_one_pixel_takes_it_away(shape: tuple[int, int]) -> None:
    pixels = np.full((*shape, 3), 77, np.uint8)
    assert decode_in_memory(pixels, SIZE).warning == "one flat colour"
    assert decode(encoded(Image.fromarray(pixels), "PNG"), SIZE).warning == "one flat colour"
    pixels[shape[0] // 2, shape[1] // 2] = 255
    assert decode_in_memory(pixels, SIZE).warning is None


@pytest.mark.parametrize("value", [0, 1, 127, 200, 255])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(format: str, value: int) -> None:
    pixels = np.full((40, 40), value * 257, ">u2")
    if format == "PPM":  # by hand: older Pillows read it but don't write it
        data = b"P5 40 40 65535\n" + pixels.tobytes()
    else:
        data = encoded(Image.fromarray(pixels.astype(np.uint16)), format)
    np.testing.assert_array_equal(load_image(data, SIZE), value)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_in_either_byte_order(dtype: str) -> None:
    image = Image.fromarray(np.full((40, 40), 0x1234, dtype))
    np.testing.assert_array_equal(preprocess(image, SIZE), 0x12)


def test_integer_mode_with_16_bit_values_is_scaled() -> None:
    image = Image.fromarray(np.full((40, 40), 200 * 257, np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(preprocess(image, SIZE), 200)


@pytest.mark.parametrize("value", [-1, 2**16, 2**31 - 1])
def test_integer_mode_beyond_16_bits_is_refused(value: int) -> None:
    with pytest.raises(ImageError, match="32-bit integer pixels"):
        load_image(encoded(Image.fromarray(np.full((40, 40), value, np.int32)), "TIFF"), SIZE)


def test_floating_point_tiff_is_refused_with_the_reason() -> None:
    with pytest.raises(ImageError, match="floating-point pixels have no known range"):
        load_image(encoded(Image.fromarray(np.zeros((40, 40), np.float32)), "TIFF"), SIZE)


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(data, SIZE), np.broadcast_to([255, 0, 0], (SIZE, SIZE, 3)))


HEIC = Path(__file__).parents[2] / "data" / "turned.heic"
"""`smooth(64, 48)`, stored upright, to be shown turned by 90° clockwise (`irot`); made by pillow-heif."""


def test_a_heic_is_decoded_as_it_is_to_be_shown() -> None:
    pytest.importorskip("pi_heif")
    upright = smooth(64, 48).transpose(Image.Transpose.ROTATE_270)
    # 4 levels: HEVC's own loss; a wrong turn is off by up to 247.
    np.testing.assert_allclose(load_image(HEIC, SIZE).astype(int), preprocess(upright, SIZE), atol=4)


def test_without_its_decoder_a_heic_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for source in (HEIC, HEIC.read_bytes()):
        with pytest.raises(ImageError, match=r"HEIF.*mdnet\[heif\]"):
            load_image(source, SIZE)


@pytest.mark.filterwarnings("ignore:image file could not be identified because AVIF support not installed")
def test_a_pillow_without_avif_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(smooth(40, 40), "AVIF")
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(ImageError, match="AVIF image, but this Pillow was built without"):
        load_image(data, SIZE)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (3, 20000)])
def test_tiny_and_very_long_images_cost_nothing(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (10, 200, 30)), "PNG")
    tracemalloc.start()
    pixels = load_image(data, SIZE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(pixels, np.broadcast_to([10, 200, 30], (SIZE, SIZE, 3)))
    assert peak < 4 * 2**20


@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (50_000, 40_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_a_decompression_bomb_is_refused_by_its_header(
    png_declaring: Callable[[int, int], bytes], width: int, height: int, action: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ImageError, match=f"^{width}x{height} pixels exceed the limit of {MAX_PIXELS}$"):
            load_image(png_declaring(width, height), SIZE)


def webp(kind: bytes, width: int, height: int) -> bytes:
    """The header of a WebP that declares any size, and nothing behind it."""
    head = {
        b"VP8X": bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little"),
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }[kind]
    chunk = kind + struct.pack("<I", len(head)) + head + bytes(16)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_webp_is_refused_by_its_header_before_pillow_makes_room_for_it(
    monkeypatch: pytest.MonkeyPatch, kind: bytes
) -> None:
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageError, match=f"^16383x16381 pixels exceed the limit of {MAX_PIXELS}$"):
        load_image(webp(kind, 16383, 16381), SIZE)


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"lossless": True, "exif": b"Exif\0\0"}])
def test_the_size_in_a_webps_header_is_that_of_its_pixels(options: dict[str, object]) -> None:
    data = encoded(smooth(301, 67), "WEBP", **options)
    for limit, fits in ((301 * 67, True), (301 * 67 - 1, False)):
        try:
            assert decode(data, SIZE, max_pixels=limit).width == 301
        except ImageError as error:
            assert not fits
            assert str(error) == f"301x67 pixels exceed the limit of {limit}"


def test_the_pixel_limit_is_what_is_still_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_PIXELS", 100)
    assert preprocess(noise(10, 10), SIZE).shape == (SIZE, SIZE, 3)
    for too_large in (noise(101, 1), Image.new("L", (1, 101))):
        with pytest.raises(ImageError, match="exceed the limit of 100"):
            preprocess(too_large, SIZE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is text, whatever its name says\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),  # would start Ghostscript
    ],
)
def test_what_is_not_an_image_is_named(tmp_path: Path, data: bytes, reason: str) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(data)
    for source in (data, file):
        with pytest.raises(ImageError, match=f"^{reason}"):
            load_image(source, SIZE)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_cut_file_is_an_image_error(format: str) -> None:
    data = encoded(Image.fromarray(noise(60, 60)), format)
    with pytest.raises(ImageError) as caught:
        load_image(data[: len(data) // 2], SIZE)
    assert "\n" not in str(caught.value)
    if format in ("JPEG", "PNG", "BMP"):
        assert str(caught.value).startswith("truncated (")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_corrupted_bytes_give_pixels_or_an_image_error(format: str) -> None:
    rng = np.random.default_rng(0)
    data = np.frombuffer(encoded(Image.fromarray(noise(24, 24)), format), np.uint8)
    refused = 0
    for _ in range(150):
        mutant = data.copy()
        mutant[rng.integers(0, min(len(data), 300), 4)] = rng.integers(0, 256, 4)  # headers, mostly
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load_image(mutant.tobytes(), SIZE).shape == (SIZE, SIZE, 3)
            except ImageError:
                refused += 1
    assert refused


@pytest.mark.parametrize(
    "error", [OSError("x"), SyntaxError("x"), ValueError("x"), KeyError(3), MemoryError(), EOFError()]
)
def test_any_exception_of_a_decoder_is_an_image_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(ImageError, match=r"^(damaged \(|not enough memory)"):
        preprocess(noise(40, 40), SIZE)


def test_an_interrupt_is_not_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "resize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        preprocess(noise(40, 40), SIZE)


@pytest.mark.usefixtures("deadline")
def test_a_path_that_is_no_file_gives_its_reason(tmp_path: Path, fifo: Path) -> None:
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    reasons = {
        tmp_path / "missing.jpg": "no such file",
        tmp_path: "is a directory",
        fifo: "not a regular file",
        Path("/dev/zero"): "not a regular file",
        loop: "too many levels of symbolic links",
        tmp_path / ("n" * 300): "file name too long",
    }
    for path, reason in reasons.items():
        with pytest.raises(ImageError, match=f"^{reason}$"):
            load_image(path, SIZE)


def test_a_file_without_permission_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"x")

    # Root, which tests may run as, reads everything: the refusal is staged.
    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(io, "open", refuse)
    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(ImageError, match=r"^permission denied$"):
        load_image(file, SIZE)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        Image.new("RGB", (0, 5)),
        None,
        7,
    ],
)
def test_what_is_in_memory_is_checked_too(image: object) -> None:
    with pytest.raises(ImageError, match=r"expected a|no pixels"):
        preprocess(image, SIZE)  # type: ignore[arg-type]


def test_importing_leaves_the_warning_filters_alone() -> None:
    code = """
import warnings, numpy, PIL.Image
before = list(warnings.filters)
import mdnet_rt.images.preprocess
assert warnings.filters == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
