"""Small pictures that a page carries in itself; the macro `picture` of `macros.html.j2` shows them."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image


class Thumbnail(NamedTuple):
    """A small JPEG and its size in pixels."""

    width: int
    height: int
    jpeg: bytes

    @property
    def source(self) -> str:
        """The picture as a `data:` URL."""
        return f"data:image/jpeg;base64,{base64.b64encode(self.jpeg).decode()}"


def thumbnail(pixels: np.ndarray, side: int) -> Thumbnail:
    """`pixels`, uint8 `[H, W, 3]`, as a picture of at most `side` pixels each way; it holds no part of `pixels`."""
    stream = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    picture.save(stream, "JPEG", quality=85)
    return Thumbnail(*picture.size, stream.getvalue())
