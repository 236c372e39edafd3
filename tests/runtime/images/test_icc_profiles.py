"""Colours are those that a file's profile means, in sRGB; without a usable profile they are taken as they are."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from icc import SPACES, cmyk_profile, from_srgb, grey_from_srgb, grey_profile, rgb_profile
from PIL import Image, ImageCms
from pngs import png, profile

from mdnet_rt.images.icc_profiles import MAX_PROFILE, UNUSABLE, Profile
from mdnet_rt.images.preprocess import decode, load_image, preprocess

SIZE = 32
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def blocks() -> np.ndarray:
    """4×4 squares of one colour each, not far from grey, so that every space has it. uint8 `[128, 128, 3]`."""
    colours = np.random.default_rng(0).integers(0, 70, (4, 4, 3)) + np.linspace(20, 180, 4)[:, None, None]
    return large(colours)


def large(colours: np.ndarray) -> np.ndarray:
    return np.kron(colours.astype(np.uint8), np.ones((32, 32, 1), np.uint8))


def encoded(pixels: np.ndarray, format: str, profile: bytes, mode: str | None = None, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, format, icc_profile=profile, **options)
    return stream.getvalue()


def inside(pixels: np.ndarray) -> np.ndarray:
    """What the resize makes of each square alone; where two meet, it mixes their colours in the space of the file."""
    return pixels.reshape(4, 8, 4, 8, -1)[:, 2:6, :, 2:6].astype(int)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("format", LOSSLESS)
def test_rgb_of_any_space_becomes_srgb(space: str, format: str) -> None:
    wanted = preprocess(blocks(), SIZE)
    data = encoded(from_srgb(blocks(), space), format, rgb_profile(space), **LOSSLESS[format])
    # 2 levels: rounding in the wider space, whose steps are larger. Untouched it is off by 10 or more.
    assert np.abs(inside(load_image(data, SIZE)) - inside(wanted)).max() <= 2
    assert np.abs(inside(load_image(data, SIZE, to_srgb=False)) - inside(wanted)).max() > 5


def test_a_jpegs_profile_counts_at_every_size_it_is_decoded_at() -> None:
    pixels = np.kron(from_srgb(blocks(), "Display P3"), np.ones((4, 4, 1), np.uint8))  # draft mode decodes a part of it
    data = encoded(pixels, "JPEG", rgb_profile("Display P3"), quality=98, subsampling=0)
    # 4 levels: as above, and JPEG's loss.
    assert np.abs(inside(load_image(data, SIZE)) - inside(preprocess(blocks(), SIZE))).max() <= 4


def test_an_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    difference = load_image(encoded(noise, "PNG", profile), SIZE).astype(int) - preprocess(noise, SIZE)
    assert np.abs(difference).max() <= 1  # littlecms rounds


@pytest.mark.parametrize("exponent", [1.4, 1.8])
def test_grey_with_a_curve_becomes_srgb(exponent: float) -> None:
    grey = blocks()[:, :, 0]
    data = encoded(grey_from_srgb(grey, exponent), "PNG", grey_profile(exponent))
    wanted = inside(preprocess(np.dstack([grey] * 3), SIZE))
    # 3 levels: in the dark, steps of these curves are up to 3 of sRGB's.
    assert np.abs(inside(load_image(data, SIZE)) - wanted).max() <= 3


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_grey_with_alpha_has_its_grey_profile(kind: type) -> None:
    grey = blocks()[:, :, 0]
    opaque = np.dstack([grey_from_srgb(grey, 1.8), np.full_like(grey, 255)]).astype(kind)
    pixels = opaque if kind is np.uint8 else opaque * 257
    decoded = decode(png(pixels, profile(grey_profile(1.8))), SIZE)
    assert decoded.warning is None
    # 3 levels: as above.
    assert np.abs(inside(decoded.pixels) - inside(preprocess(np.dstack([grey] * 3), SIZE))).max() <= 3


def test_colours_with_alpha_and_a_grey_profile_have_a_warning() -> None:
    image = np.dstack([blocks(), np.full((128, 128), 255, np.uint8)])
    assert decode(encoded(image, "PNG", grey_profile(1.8)), SIZE).warning == UNUSABLE


def test_grey_with_an_rgb_profile_is_read_by_it() -> None:
    grey = blocks()[:, :, 0]
    data = encoded(grey_from_srgb(grey, 1.8), "PNG", rgb_profile("ProPhoto"))
    assert np.abs(inside(load_image(data, SIZE)) - inside(preprocess(np.dstack([grey] * 3), SIZE))).max() <= 2


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_cmyk_has_the_colours_of_its_inks(format: str) -> None:
    # Inks that no formula would guess; but paper is white, and all of the inks are black.
    inks = np.random.default_rng(1).integers(40, 200, (2, 2, 2, 2, 3)).astype(np.uint8)
    inks[0, 0, 0, 0], inks[1, 1, 1, 1] = (255, 255, 255), (0, 0, 0)
    chosen = np.random.default_rng(2).permutation(np.array(list(np.ndindex(2, 2, 2, 2)))).reshape(4, 4, 4)
    image = large(255 * chosen)
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {}
    found = inside(load_image(encoded(image, format, cmyk_profile(inks), "CMYK", **options), SIZE))
    wanted = inks[tuple(np.moveaxis(chosen, -1, 0))].astype(int)[:, None, :, None]
    # 4 levels: Lab in 8 bits; JPEG's loss besides.
    assert np.abs(found - wanted).max() <= (4 if format == "TIFF" else 8)


BROKEN = {
    "not a profile": b"this is no profile",
    "cut": rgb_profile("Adobe RGB")[:200],
    "of another kind of image": cmyk_profile(np.zeros((2, 2, 2, 2, 3), np.uint8)),
    "without its curves": rgb_profile("Adobe RGB").replace(b"rTRC", b"xTRC"),
    "too large": rgb_profile("Adobe RGB") + bytes(MAX_PROFILE),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_profile_that_cant_be_used_costs_a_warning_and_not_the_picture(name: str, format: str) -> None:
    decoded = decode(encoded(blocks(), format, BROKEN[name], **LOSSLESS[format]), SIZE)
    np.testing.assert_array_equal(decoded.pixels, preprocess(blocks(), SIZE))
    assert decoded.warning == UNUSABLE


def test_a_jpeg_that_lacks_a_part_of_its_profile_has_a_warning() -> None:
    data = encoded(blocks(), "JPEG", rgb_profile("Adobe RGB").ljust(100_000, b"\0"))
    assert decode(data, SIZE).warning is None
    second = b"ICC_PROFILE\0\2\2"
    assert second in data
    assert decode(data.replace(second, b"NOT" + second[3:]), SIZE).warning == UNUSABLE


def test_cmyk_with_an_rgb_profile_has_a_warning() -> None:
    data = encoded(np.zeros((40, 40, 4), np.uint8) + 9, "TIFF", rgb_profile("Adobe RGB"), "CMYK")
    assert decode(data, SIZE).warning == f"{UNUSABLE}; one flat colour"


def test_damaged_profiles_never_fail() -> None:
    rng = np.random.default_rng(0)
    for whole in (rgb_profile("ProPhoto"), cmyk_profile(np.full((2, 2, 2, 2, 3), 99, np.uint8))):
        image = Image.new("RGB" if b"RGB " in whole[:20] else "CMYK", (4, 4))
        for _ in range(300):
            mutant = np.frombuffer(whole, np.uint8).copy()
            mutant[rng.integers(0, min(len(mutant), 300), 3)] = rng.integers(0, 256, 3)
            image.info["icc_profile"] = mutant.tobytes()
            profile = Profile(image)
            assert profile.to_srgb(image.copy()).size == (4, 4)


def test_a_picture_in_memory_keeps_its_profile_and_an_array_has_none(tmp_path: Path) -> None:
    pixels = from_srgb(blocks(), "ProPhoto")
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG", rgb_profile("ProPhoto")))
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(preprocess(image, SIZE), load_image(tmp_path / "a.png", SIZE))
        np.testing.assert_array_equal(
            preprocess(np.asarray(image), SIZE), load_image(tmp_path / "a.png", SIZE, to_srgb=False)
        )
