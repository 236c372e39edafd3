"""A thousand files of many kinds have the pixels that another decoder finds in them: libvips, or OpenCV."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest
from icc import cmyk_profile, from_srgb, grey_from_srgb, grey_profile, rgb_profile
from PIL import Image, ImageCms
from pngs import png, transparent
from tiffs import tiff

from mdnet_rt.images.preprocess import load_image, preprocess

cv2 = pytest.importorskip("cv2")
pyvips = pytest.importorskip("pyvips")

pytestmark = pytest.mark.slow

SIZE = 64
FILES = 1000
BOUND = 1.0
"""Mean difference of a file's pixels, in levels of 255: what rounding costs."""
ORIENTATION = 0x0112
NONE, SRGB, P3, ADOBE = "", "sRGB", "Display P3", "Adobe RGB"
GREY_EXPONENT = 1.8
INKS = np.random.default_rng(3).integers(40, 200, (2, 2, 2, 2, 3)).astype(np.uint8)
INKS[0, 0, 0, 0], INKS[1, 1, 1, 1] = 255, 0


class Picture(NamedTuple):
    """What a file is made of."""

    pixels: np.ndarray
    """sRGB with alpha, uint8 `[SIZE, SIZE, 4]`."""
    profile: str
    orientation: int
    rng: np.random.Generator

    def of(self, mode: str, bits: int = 8) -> np.ndarray:
        """The pixels in one of Pillow's modes and in the space of the profile; of 16 bits, the lower 8 are noise."""
        colours, alpha = self.pixels[:, :, :3], self.pixels[:, :, 3]
        if mode == "CMYK":
            pixels = np.dstack([255 - colours, alpha // 2])
        elif mode in ("L", "LA"):
            pixels = grey_from_srgb(colours[:, :, 1], GREY_EXPONENT) if self.profile else colours[:, :, 1]
        else:
            pixels = from_srgb(colours, self.profile) if self.profile in (P3, ADOBE) else colours
        if mode in ("LA", "RGBA"):
            pixels = np.dstack([pixels, alpha])
        if bits == 8:
            return pixels
        return pixels.astype(np.uint16) << 8 | self.rng.integers(0, 256, pixels.shape, np.uint16)

    def icc(self, mode: str) -> bytes | None:
        if not self.profile:
            return None
        if mode == "CMYK":
            return cmyk_profile(INKS)
        if mode in ("L", "LA"):
            return grey_profile(GREY_EXPONENT)
        if self.profile == SRGB:
            return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        return rgb_profile(self.profile)


def picture(rng: np.random.Generator, profile: str, orientation: int) -> Picture:
    """Waves, an edge and some noise, different in every corner; alpha of every value."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = [np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + rng.uniform(0, 6)) for _ in range(4)]
    pixels = 0.5 + 0.4 * np.stack(waves, axis=2)
    pixels[x + 2 * y < rng.uniform(0.3, 1.5)] *= rng.uniform(0.3, 1, 4)
    pixels[:, :, 3] = 2 * pixels[:, :, 3] - 0.4
    noise = rng.normal(0, rng.choice([0, 2, 10]), pixels.shape)
    return Picture(np.clip(np.round(pixels * 255 + noise), 0, 255).astype(np.uint8), profile, orientation, rng)


Write = Callable[[Picture], bytes]
Read = Callable[[bytes], np.ndarray]


def pillow(format: str, mode: str, *, colours: int | None = None, **options: object) -> Write:
    """By Pillow. With `colours` the file has a palette; with `quality` it is another one for each file."""

    def write(picture: Picture) -> bytes:
        image = Image.fromarray(picture.of(mode), mode if mode == "CMYK" else None)
        if colours:
            image = image.quantize(colours)
        exif = Image.Exif()
        exif[ORIENTATION] = picture.orientation
        changed = {"quality": int(picture.rng.integers(30, 100))} if "quality" in options else {}
        stream = io.BytesIO()
        image.save(stream, format, exif=exif, icc_profile=picture.icc(mode), **{**options, **changed})
        return stream.getvalue()

    return write


def one_bit(format: str) -> Write:
    def write(picture: Picture) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(picture.of("L")).convert("1").save(stream, format)
        return stream.getvalue()

    return write


def vips(suffix: str, mode: str, *, bits: int = 8, **options: object) -> Write:
    """By libvips: what Pillow doesn't write."""

    def write(picture: Picture) -> bytes:
        spaces = {("L", 8): "b-w", ("L", 16): "grey16", ("R", 8): "srgb", ("R", 16): "rgb16"}
        image = pyvips.Image.new_from_array(picture.of(mode, bits), interpretation=spaces[mode[0], bits]).copy()
        image.set_type(pyvips.GValue.gint_type, "orientation", picture.orientation)
        if icc := picture.icc(mode):
            image.set_type(pyvips.GValue.blob_type, "icc-profile-data", icc)
        return image.write_to_buffer(suffix, **options)

    return write


def layout(mode: str, bits: int, **options: object) -> Write:
    """A TIFF that neither writes."""
    return lambda picture: tiff(picture.of(mode, bits), **options)


def with_key(mode: str, bits: int) -> Write:
    """A PNG of few colours, of which the commonest is transparent."""

    def write(picture: Picture) -> bytes:
        pixels = (picture.of(mode) // 64 * 64 + 32).astype(np.uint8 if bits == 8 else np.uint16) << (bits - 8)
        found, counts = np.unique(pixels.reshape(SIZE * SIZE, -1), axis=0, return_counts=True)
        return png(pixels, transparent(*found[counts.argmax()].tolist()))

    return write


def netpbm(magic: str, maximum: int) -> Write:
    def write(picture: Picture) -> bytes:
        pixels = picture.of("L" if magic in ("P2", "P5") else "RGB")
        values = np.round(pixels / 255 * maximum).astype(np.uint8 if maximum == 255 else ">u2")
        body = values.tobytes() if magic in ("P5", "P6") else "".join(f"{value}\n" for value in values.ravel()).encode()
        return f"{magic}\n{SIZE} {SIZE}\n{maximum}\n".encode() + body

    return write


def by_vips(data: bytes) -> np.ndarray:
    """Upright, in sRGB, then on white."""
    return _on_white(_in_srgb(_upright(data))).cast("uchar").numpy()


def by_vips_blended_first(data: bytes) -> np.ndarray:
    return _in_srgb(_on_white(_upright(data))).cast("uchar").numpy()


def by_vips_with_pillows_inks(data: bytes) -> np.ndarray:
    inks = _upright(data).numpy().astype(float)
    return np.round((255 - inks[:, :, :3]) * (255 - inks[:, :, 3:]) / 255)


def _upright(data: bytes) -> pyvips.Image:
    return pyvips.Image.new_from_buffer(data, "").autorot()


def _in_srgb(image: pyvips.Image) -> pyvips.Image:
    if image.get_typeof("icc-profile-data"):
        # As mdnet_rt.images.icc_profiles has it; neither library's default.
        image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True, depth=8)
    return image.colourspace("srgb")


def _on_white(image: pyvips.Image) -> pyvips.Image:
    return image.flatten(background=0xFFFF if image.format == "ushort" else 0xFF) if image.hasalpha() else image


def by_opencv(data: bytes) -> np.ndarray:
    """For what libvips' wheel doesn't read: BMP, Netpbm, JPEG 2000."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    pixels = np.atleast_3d(pixels >> 8 if pixels.dtype == np.uint16 else pixels)
    if pixels.shape[2] == 4:
        alpha = pixels[:, :, 3:] / 255
        pixels = np.round(pixels[:, :, :3] * alpha + 255 * (1 - alpha))
    return np.broadcast_to(pixels[:, :, ::-1], (SIZE, SIZE, 3))


def as_it_is(pixels: np.ndarray) -> np.ndarray:
    return pixels


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels @ [0.299, 0.587, 0.114]


class Choice(NamedTuple):
    """Where decoders may differ, and the other one chose otherwise."""

    reason: str
    bound: float
    """In place of `BOUND`, against the other one's choice."""
    read: Read = by_vips
    """The other decoder with our choice, for which `BOUND` holds."""
    look: Callable[[np.ndarray], np.ndarray] = as_it_is
    """What of the pixels `read` is compared by."""


BLENDED_FIRST = Choice("a picture is blended with white before its profile applies", 5, read=by_vips_blended_first)
CHROMA = Choice("libavif interpolates chroma, libheif repeats it; luma is the same", 6, look=luma)
INKS_UNKNOWN = Choice("no profile says what CMYK's inks look like", 30, read=by_vips_with_pillows_inks)


class Kind(NamedTuple):
    name: str
    write: Write
    profiles: tuple[str, ...] = (NONE,)
    choice: Choice | None = None
    read: Read = by_vips


GREY = (NONE, ADOBE)
ALL = (NONE, SRGB, P3, ADOBE)


def with_alpha(name: str, write: Write, profiles: tuple[str, ...] = ALL) -> Iterator[Kind]:
    plain = tuple(profile for profile in profiles if profile in (NONE, SRGB))
    yield Kind(name, write, plain)
    yield Kind(f"{name} and profile", write, profiles[len(plain) :], BLENDED_FIRST)


def jpeg() -> Iterator[Kind]:
    for sub, progressive in itertools.product(("4:4:4", "4:2:2", "4:2:0"), (False, True)):
        name = f"JPEG {sub}{' progressive' if progressive else ''}"
        yield Kind(name, pillow("JPEG", "RGB", subsampling=sub, progressive=progressive, quality=True), ALL)
    yield Kind("JPEG of RGB", pillow("JPEG", "RGB", keep_rgb=True, quality=True), ALL)
    yield Kind("JPEG grey", pillow("JPEG", "L", quality=True), GREY)
    yield Kind("JPEG grey progressive", pillow("JPEG", "L", progressive=True, quality=True), GREY)
    yield Kind("JPEG with restarts", vips(".jpg", "RGB", Q=85, restart_interval=3), ALL)
    yield Kind("JPEG CMYK", pillow("JPEG", "CMYK", quality=True), (ADOBE,))
    yield Kind("JPEG CMYK without a profile", pillow("JPEG", "CMYK", quality=True), choice=INKS_UNKNOWN)


def png_files() -> Iterator[Kind]:
    for bits, interlace in itertools.product((8, 16), (False, True)):
        name = f"{bits} bits{' interlaced' if interlace else ''}"
        yield Kind(f"PNG RGB {name}", vips(".png", "RGB", bits=bits, interlace=interlace), ALL)
        yield Kind(f"PNG grey {name}", vips(".png", "L", bits=bits, interlace=interlace), GREY)
        yield from with_alpha(f"PNG RGBA {name}", vips(".png", "RGBA", bits=bits, interlace=interlace))
        yield from with_alpha(f"PNG grey, alpha {name}", vips(".png", "LA", bits=bits, interlace=interlace), GREY)
    for bits in (1, 2, 4):
        yield Kind(f"PNG grey {bits} bits", vips(".png", "L", bitdepth=bits))
    for bits in (1, 2, 4, 8):
        yield Kind(f"PNG palette {bits} bits", pillow("PNG", "RGB", colours=2**bits), ALL)
    yield from with_alpha("PNG palette with alpha", pillow("PNG", "RGBA", colours=256))
    for mode, bits in itertools.product(("L", "RGB"), (8, 16)):
        yield Kind(f"PNG {mode} {bits} bits, one colour transparent", with_key(mode, bits))


def webp_avif_gif() -> Iterator[Kind]:
    yield Kind("WebP lossy", pillow("WEBP", "RGB", quality=True), ALL)
    yield Kind("WebP lossless", pillow("WEBP", "RGB", lossless=True), ALL)
    yield from with_alpha("WebP lossy with alpha", pillow("WEBP", "RGBA", quality=True))
    yield from with_alpha("WebP lossless with alpha", pillow("WEBP", "RGBA", lossless=True, exact=True))
    yield Kind("AVIF 4:4:4", pillow("AVIF", "RGB", subsampling="4:4:4", speed=10, quality=True), ALL)
    yield Kind("AVIF 4:2:0", pillow("AVIF", "RGB", subsampling="4:2:0", speed=10, quality=True), choice=CHROMA)
    yield from with_alpha("AVIF with alpha", pillow("AVIF", "RGBA", subsampling="4:4:4", speed=10, quality=True))
    yield Kind("GIF", pillow("GIF", "RGB", colours=256))
    yield Kind("GIF with transparency", pillow("GIF", "RGBA", colours=64))
    yield Kind("GIF interlaced", vips(".gif", "RGBA", interlace=True))


def tiff_files() -> Iterator[Kind]:
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield Kind(f"TIFF {compression} strips", pillow("TIFF", "RGB", compression=compression), ALL)
    tiles = {"tile": True, "tile_width": 32, "tile_height": 16}
    for compression in ("none", "lzw", "deflate", "jpeg"):
        yield Kind(f"TIFF {compression} tiles", vips(".tif", "RGB", compression=compression, **tiles), ALL)
    for bits in (8, 16):
        options = {"bits": bits, "compression": "deflate", "predictor": "horizontal"}
        yield Kind(f"TIFF grey {bits} bits", vips(".tif", "L", **options), GREY)
        yield Kind(f"TIFF RGB {bits} bits", vips(".tif", "RGB", **options), ALL)
        yield from with_alpha(f"TIFF RGBA {bits} bits", vips(".tif", "RGBA", **options, **tiles))
        planes = {"order": ">", "planar": True, "deflate": True}
        yield Kind(f"TIFF RGB {bits} bits, big-endian planes", layout("RGB", bits, **planes))
        yield Kind(f"TIFF RGBA {bits} bits, big-endian planes", layout("RGBA", bits, **planes, alpha=True))
        yield Kind(f"TIFF grey {bits} bits, 0 is white", layout("L", bits, photometric=0, tile=16))
    yield Kind("TIFF premultiplied", vips(".tif", "RGBA", premultiply=True))
    yield from with_alpha("TIFF grey, alpha", vips(".tif", "LA"), GREY)
    for bits, white_is_zero in itertools.product((1, 2, 4), (False, True)):
        name = f"TIFF grey {bits} bits{', 0 is white' if white_is_zero else ''}"
        yield Kind(name, vips(".tif", "L", bitdepth=bits, miniswhite=white_is_zero))
    yield Kind("TIFF fax", vips(".tif", "L", bitdepth=1, compression="ccittfax4"))
    yield Kind("TIFF CMYK", pillow("TIFF", "CMYK", compression="tiff_lzw"), (ADOBE,))
    yield Kind("TIFF CMYK without a profile", pillow("TIFF", "CMYK"), choice=INKS_UNKNOWN)


def by_opencv_only() -> Iterator[Kind]:
    writers = {
        "BMP": pillow("BMP", "RGB"),
        "BMP 32 bits": pillow("BMP", "RGBA"),
        "BMP grey": pillow("BMP", "L"),
        "BMP palette": pillow("BMP", "RGB", colours=200),
        "BMP 1 bit": one_bit("BMP"),
        "PBM": one_bit("PPM"),
        "JPEG 2000": pillow("JPEG2000", "RGB", irreversible=True, quality_mode="rates", quality_layers=[20]),
        "JPEG 2000 lossless": pillow("JPEG2000", "RGB"),
        "JPEG 2000 grey": pillow("JPEG2000", "L"),
        "JPEG 2000 with alpha": pillow("JPEG2000", "RGBA"),
    }
    for magic, maximum in itertools.product(("P2", "P3", "P5", "P6"), (255, 65535)):
        writers[f"{'PGM' if magic in ('P2', 'P5') else 'PPM'} {magic} to {maximum}"] = netpbm(magic, maximum)
    for name, write in writers.items():
        yield Kind(name, write, read=by_opencv)


KINDS = [*jpeg(), *png_files(), *webp_avif_gif(), *tiff_files(), *by_opencv_only()]


def files_of(index: int) -> Iterator[tuple[str, bytes]]:
    """The files of one kind, with what a failed one is known by; of all kinds, `FILES`."""
    kind = KINDS[index]
    for turn, number in enumerate(range(index, FILES, len(KINDS))):
        profile, orientation = kind.profiles[(turn + index) % len(kind.profiles)], 1 + turn % 8
        name = f"file {number}, orientation {orientation}, profile {profile or 'none'}"
        yield name, kind.write(picture(np.random.default_rng([1, number]), profile, orientation))


def mean_difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(float) - theirs).mean())


def test_a_picture_of_the_models_size_is_neither_cut_nor_resized() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    np.testing.assert_array_equal(preprocess(pixels, SIZE), pixels)


@pytest.mark.parametrize("index", range(len(KINDS)), ids=[kind.name for kind in KINDS])
def test_pixels_are_those_of_another_decoder(index: int) -> None:
    _, _, _, choice, read = KINDS[index]
    for name, data in files_of(index):
        ours = load_image(data, SIZE)
        assert mean_difference(ours, read(data)) <= (choice.bound if choice else BOUND), name
        if choice:
            assert mean_difference(choice.look(ours), choice.look(choice.read(data))) <= BOUND, (
                f"{name} ({choice.reason})"
            )
