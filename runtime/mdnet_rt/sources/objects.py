"""Objects of a Python program → the images to score: what `Scorer.score` and `Scorer.stream` take.

What can't be an image by its type, shape or values is a mistake of the program, and one `UsageError`. What can be wrong
with a single image (a file that is missing or damaged, an empty array) becomes the reason in its row.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, TypeAlias

import numpy as np
from PIL import Image

from mdnet_engines.errors import UsageError, first_line, printable
from mdnet_rt.images.preprocess import MAX_BYTES, ImageError
from mdnet_rt.sources.entry import Entry, is_url
from mdnet_rt.sources.locations import find_locations, is_pattern, read_locations


class HasArray(Protocol):
    """What NumPy can read: tensors of PyTorch, JAX and TensorFlow; for paths, a column of pandas, Polars or pyarrow."""

    def __array__(self) -> Any: ...


Item: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | HasArray | Entry
)
"""One image or several: see `read_objects`."""

EXPECTED = (
    "expected a path, folder, pattern or URL, a file's bytes or a file opened with 'rb', a PIL image, an array or "
    "tensor [H, W, 3], [3, H, W] or [H, W] of uint8 or of float from 0 to 1, or a list or generator of these"
)
_CHANNELS = (1, 3, 4)
_HALF_A_LEVEL = 0.5 / 255
"""How far a float may be outside 0 to 1: what rounding makes 0 or 255 anyway."""
Data: TypeAlias = Path | bytes | Callable[[], bytes] | Image.Image | np.ndarray | ImageError
"""An image as entries have it, or in memory; an array is uint8 `[H, W, 3]` RGB."""
_Images: TypeAlias = Iterable[tuple[str | None, Data]]


def read_objects(items: Iterable[Item] | Item) -> Iterator[tuple[str, Data]]:
    """The name and data of each image in one item, or in an iterable of items, read as they are taken.

    - Paths and URLs mean what they mean on the command line (`find_locations`, `read_locations`). A path without a file
      is an image without a score; so is, in an iterable, a folder or pattern without images.
    - Bytes are an image file's; a file that is open for reading is read from its beginning.
    - Arrays, and what NumPy can read as one, are `[H, W]`, `[H, W, C]` or `[C, H, W]`, with C 1 (grey), 3 (RGB) or 4
      (RGBA), or a stack of the latter two; uint8, or float from 0 to 1. A column of paths counts as a list of them.

    A row is called by its path, by a PIL image's or an open file's own name, else `item N`, where N counts rows from 0.

    Raises:
        UsageError: something is no image. What is at hand is checked before this function returns: a list and the
            types and shapes in it, a stack with its values. The rest as it is taken.
    """
    _refuse_tables(items)
    if _is_array(items) and _is_column(items):
        items = _to_numpy(items, "").tolist()
    if _is_one(items):
        found = iter(_images(items, alone=True))
    elif isinstance(items, Iterable):
        if isinstance(items, (list, tuple)):
            for i, item in enumerate(items):
                _check(item, f"item {i}")
        found = chain.from_iterable(_images(item, f"item {i}") for i, item in enumerate(items))
    else:
        _refuse(items)
    return ((f"item {i}" if name is None else name, data) for i, (name, data) in enumerate(found))


def _refuse_tables(items: object) -> None:
    names = getattr(items, "column_names", None) or getattr(items, "columns", None)
    if names is not None and not isinstance(items, np.ndarray):
        columns = [str(name) for name in names]
        paths = next((name for name in columns if _holds_paths(items, name)), columns[0] if columns else "path")
        raise UsageError(
            f"can't score {_a(items)} with the columns {printable(', '.join(columns))}: give the one that holds the "
            f"images, such as table[{paths!r}]"
        )
    if isinstance(items, Mapping):
        _refuse(items)


def _holds_paths(table: Any, column: str) -> bool:
    try:
        return isinstance(next(iter(table[column])), (str, os.PathLike))
    except Exception:  # only for a better message: a table of any package, perhaps empty
        return False


def _is_one(item: object) -> bool:
    known = isinstance(item, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, Entry))
    return known or hasattr(item, "read") or _is_array(item)


def _is_array(item: object) -> bool:
    return hasattr(item, "__array__") or hasattr(item, "__dlpack__")


def _is_column(item: Any) -> bool:
    """Whether it is a row of objects, such as paths, rather than of numbers."""
    return len(getattr(item, "shape", (1,))) == 1 and _to_numpy(item, "").dtype.kind in "OUT"


def _check(item: Any, where: str) -> None:
    """Refuse what its type, or its shape, says is no image; nothing is read."""
    if isinstance(item, io.TextIOBase):
        raise UsageError(f"{_named(where)}a file opened as text; open it with 'rb'")
    if isinstance(item, Mapping):
        _refuse(item, where)
    if _is_one(item):
        if hasattr(item, "shape") and hasattr(item, "dtype"):
            _layout(tuple(item.shape), _type_name(item.dtype), where)
    else:
        _refuse(item, where)


def _images(item: Any, where: str = "", *, alone: bool = False) -> _Images:
    """The images of one item. `where` names it in messages."""
    _check(item, where)
    if isinstance(item, Entry):
        return [(item.name, item.data)]
    if isinstance(item, (str, os.PathLike)):
        return ((entry.name, entry.data) for entry in _located(os.fsdecode(item), alone))
    if isinstance(item, (bytes, bytearray, memoryview)):
        return [(None, bytes(item))]
    if isinstance(item, Image.Image):
        return [(str(getattr(item, "filename", "")) or None, item)]
    if hasattr(item, "read"):
        name = getattr(item, "name", None)
        return [(name if isinstance(name, str) else None, _content(item, where))]
    return _arrays(_to_numpy(item, where), where)


def _located(location: str, alone: bool) -> Iterable[Entry]:
    try:
        return read_locations(find_locations([location]))
    except UsageError as error:
        gone = not (is_url(location) or is_pattern(location) or os.path.isdir(location))  # noqa: PTH112 (never raises)
        if alone and not gone:
            raise
        return [Entry(location, ImageError("no such file" if gone else str(error)))]


def _content(file: Any, where: str) -> bytes | ImageError:
    # Now: its owner may go on to read, write or close it.
    try:
        if not hasattr(file, "seekable") or file.seekable():
            file.seek(0)  # a picture that was just written to it ends where it stands
        content = file.read(MAX_BYTES + 1)  # one more, which is then refused
    except Exception as error:  # files of any package
        return ImageError(f"can't be read ({first_line(error)})")
    if not isinstance(content, bytes):
        raise UsageError(f"{_named(where)}{_a(file)} whose read() gives {_a(content)}; {EXPECTED}")
    return content


def _arrays(array: np.ndarray, where: str) -> _Images:
    kind = _type_name(array.dtype)
    channel_axis = _layout(array.shape, kind, where)
    if kind != "uint8":
        _check_values(array, where)
    if array.ndim == 4:
        return ((None, _pixels(image, channel_axis)) for image in array)
    return [(None, _pixels(array, channel_axis))]


def _layout(shape: tuple[int, ...], kind: str, where: str) -> int | None:
    """The axis of an image that holds the channels; None if it is grey. A stack's first axis does not count."""
    got = f"{_named(where)}an array {list(shape)} of {kind}"
    if len(shape) not in (2, 3, 4):
        raise UsageError(f"{got}; {EXPECTED}")
    if kind != "uint8" and not kind.startswith(("float", "bfloat")):
        raise UsageError(f"{got}; expected uint8, 0 to 255, or float, 0 to 1")
    if len(shape) == 2:
        return None
    first, _, last = shape[-3:]
    if first in _CHANNELS and last in _CHANNELS:
        raise UsageError(f"{got}: its first or its last axis could be the channels; give a larger image, or a PIL one")
    if first not in _CHANNELS and last not in _CHANNELS:
        raise UsageError(
            f"{got}: neither its first nor its last axis has 1, 3 or 4 channels; expected [H, W, 3] or [3, H, W], or "
            "a stack of them (of grey images: [N, H, W, 1])"
        )
    return 2 if last in _CHANNELS else 0


def _pixels(image: np.ndarray, channel_axis: int | None) -> np.ndarray | Image.Image | ImageError:
    if not image.size:
        return ImageError("no pixels")
    if image.dtype != np.uint8:
        image = np.rint(image.astype(np.float32) * 255).clip(0, 255).astype(np.uint8)
    if channel_axis == 0:
        image = np.moveaxis(image, 0, 2)
    if image.ndim == 3 and image.shape[2] == 3:
        return image
    # Pillow's grey and RGBA go the way of files that are so: grey to RGB, transparency on white.
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image))


def _check_values(array: np.ndarray, where: str) -> None:
    if not array.size:
        return
    low, high = float(array.min()), float(array.max())  # NaN if there is one
    if not np.isfinite([low, high]).all():
        raise UsageError(f"{_named(where)}an array {list(array.shape)} with values that are not finite; {EXPECTED}")
    if low < -_HALF_A_LEVEL or high > 1 + _HALF_A_LEVEL:
        what = "undo the normalisation" if low < 0 else "divide by 255, or give uint8"
        raise UsageError(
            f"{_named(where)}an array {list(array.shape)} of {_type_name(array.dtype)} from {low:.4g} to {high:.4g}; "
            f"expected 0 to 1: {what}"
        )


def _to_numpy(array: Any, where: str) -> np.ndarray:
    try:
        if hasattr(array, "detach"):  # of PyTorch, which refuses to convert what has a gradient or is on a GPU
            array = array.detach().cpu()
            array = array.float() if _type_name(array.dtype) == "bfloat16" else array
        values = np.asarray(array) if hasattr(array, "__array__") else np.from_dlpack(array)
    except Exception as error:  # tensors of any package
        raise UsageError(
            f"{_named(where)}{_a(array)} that NumPy can't read ({first_line(error)}); give a NumPy array"
        ) from error
    return values.astype(np.float32) if _type_name(values.dtype) == "bfloat16" else values


def _type_name(dtype: Any) -> str:
    return str(getattr(dtype, "name", None) or dtype).rpartition(".")[2]  # torch.uint8


def _refuse(item: object, where: str = "") -> NoReturn:
    hint = ""
    if isinstance(item, Mapping):
        hint = f" with the keys {printable(', '.join(map(str, item)))}: give the image alone"
    elif where and isinstance(item, (list, tuple)):
        hint = f" of {len(item)}: give the image alone"
    raise UsageError(f"{_named(where)}{_a(item)}{hint}; {EXPECTED}")


def _named(where: str) -> str:
    return f"{where} is " if where else "can't score "


def _a(item: object) -> str:
    name = type(item).__name__
    return "None" if item is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
