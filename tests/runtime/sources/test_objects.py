"""Objects of a Python program: each kind that is taken gives the picture it holds; the others are one error at once."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdnet_engines.errors import UsageError
from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.sources.entry import Entry
from mdnet_rt.sources.objects import read_objects

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
GREY = PIXELS[..., 0]
Photo = Callable[..., Path]


def picture(data: object) -> np.ndarray:
    """What an image in memory, or a file, shows: uint8 `[H, W, 3]`, or `[H, W, 4]` with transparency."""
    if isinstance(data, np.ndarray):
        return data
    if not isinstance(data, Image.Image):
        data = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)  # type: ignore[arg-type]
    return np.asarray(data.convert("RGBA" if data.mode == "RGBA" else "RGB"))


def pictures(items: Any) -> list[np.ndarray]:
    return [picture(data) for _, data in read_objects(items)]


def names(items: Any) -> list[str]:
    return [name for name, _ in read_objects(items)]


def png(pixels: np.ndarray = PIXELS) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def as_float(pixels: np.ndarray, kind: str = "float32") -> np.ndarray:
    return (pixels / 255).astype(kind)


ARRAYS: dict[str, np.ndarray] = {
    "HWC": PIXELS,
    "CHW": PIXELS.transpose(2, 0, 1),
    "float32": as_float(PIXELS),
    "float64 CHW": as_float(PIXELS, "float64").transpose(2, 0, 1),
    "float16": as_float(PIXELS, "float16"),
    "big-endian float": as_float(PIXELS, ">f4"),
    "rounded beyond 1": as_float(PIXELS) * 1.000001 - 1e-7,
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_taken_in_either_order_and_type(array: np.ndarray) -> None:
    (found,) = pictures(array)
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize(
    "array", [GREY, GREY[..., None], GREY[None], as_float(GREY)], ids=["HW", "HW1", "1HW", "float"]
)
def test_a_grey_array_shows_grey(array: np.ndarray) -> None:
    (found,) = pictures(array)
    np.testing.assert_array_equal(found, np.repeat(GREY[..., None], 3, axis=2))


def test_transparency_is_kept_for_the_preprocessing() -> None:
    rgba = np.concatenate([PIXELS, GREY[..., None]], axis=2)
    for array in (rgba, rgba.transpose(2, 0, 1), as_float(rgba)):
        (found,) = pictures(array)
        np.testing.assert_array_equal(found, rgba)


@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 3, 1, 2)], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_stack_is_its_images(axes: tuple[int, ...], kind: str) -> None:
    stack = np.stack([PIXELS, 255 - PIXELS])
    given = (stack if kind == "uint8" else as_float(stack)).transpose(axes)
    np.testing.assert_array_equal(pictures(given), stack)
    assert names(given) == ["item 0", "item 1"]
    assert names([PIXELS, given, PIXELS]) == [f"item {i}" for i in range(4)]


def test_an_empty_stack_is_no_image() -> None:
    assert pictures(np.zeros((0, 9, 7, 3), np.uint8)) == []
    assert pictures(np.zeros((0, 3, 9, 7), np.float32)) == []


@pytest.mark.parametrize("kind", ["uint8", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["HWC", "CHW", "NCHW"])
def test_a_tensor_of_pytorch_is_taken(kind: str, layout: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(PIXELS)
    tensor = tensor if kind == "uint8" else (tensor / 255).to(getattr(torch, kind))
    tensor = {"HWC": tensor, "CHW": tensor.permute(2, 0, 1), "NCHW": tensor.permute(2, 0, 1)[None]}[layout]
    (found,) = pictures(tensor)
    # bfloat16 has 8 significant bits
    np.testing.assert_allclose(found.astype(int), PIXELS.astype(int), atol=1 if kind == "bfloat16" else 0)


def test_a_tensor_with_a_gradient_is_taken() -> None:
    torch = pytest.importorskip("torch")
    (found,) = pictures(torch.from_numpy(as_float(PIXELS)).requires_grad_())
    np.testing.assert_array_equal(found, PIXELS)


class OnlyDLPack:
    """A tensor of a package that NumPy knows nothing of but its `__dlpack__`."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


class OnlyArray:
    """An object that NumPy can read, without a shape of its own."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return PIXELS


class OnAnotherDevice:
    """A tensor that refuses, as CuPy's do."""

    shape, dtype = (9, 7, 3), np.dtype(np.uint8)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


@pytest.mark.parametrize("item", [OnlyDLPack(PIXELS.copy()), OnlyArray()], ids=["dlpack", "array"])
def test_other_packages_tensors_are_taken_by_their_protocols(item: object) -> None:
    (found,) = pictures(item)
    np.testing.assert_array_equal(found, PIXELS)


def test_a_tensor_that_does_not_convert_is_refused_with_its_reason() -> None:
    with pytest.raises(
        UsageError, match=r"OnAnotherDevice that NumPy can't read \(Implicit conversion .* NumPy array$"
    ):
        read_objects(OnAnotherDevice())


class OnlyRead:
    """A stream without a name that can't be rewound."""

    def __init__(self, content: object):
        self._content = content

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> object:
        return self._content


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, io.BytesIO, OnlyRead], ids=lambda kind: kind.__name__)
def test_a_files_bytes_are_taken_whatever_holds_them(kind: Callable[[bytes], Any]) -> None:
    for items in (kind(png()), [kind(png())], iter([kind(png())])):
        (found,) = pictures(items)
        np.testing.assert_array_equal(found, PIXELS)


def test_an_open_file_is_read_from_its_beginning_and_gives_the_name(photo: Photo) -> None:
    file = photo("a.png")
    with file.open("rb") as stream:
        stream.seek(40)
        ((name, data),) = read_objects(stream)
    assert (name, data) == (str(file), file.read_bytes())


def test_what_was_just_saved_to_memory_needs_no_rewinding() -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG")
    np.testing.assert_array_equal(pictures(stream), [PIXELS])


def test_a_file_that_is_closed_is_one_image_that_can_not_be_read() -> None:
    closed = io.BytesIO(png())
    closed.close()
    ((name, data),) = read_objects([closed])
    assert name == "item 0"
    assert isinstance(data, ImageError)
    assert "closed file" in str(data)


def test_folders_patterns_and_files_are_as_on_the_command_line(photo: Photo, tmp_path: Path) -> None:
    files = [str(photo(name)) for name in ("in/b2.png", "in/b10.png", "in/deep/c.png", "out.png")]
    assert names(tmp_path / "in") == files[:3]
    assert names(str(tmp_path / "in" / "*.png")) == files[:2]
    assert names(str(tmp_path / "**" / "c.png")) == files[2:3]
    assert names([tmp_path / "in", files[3], str(tmp_path / "in" / "b?.png")]) == [*files, files[0]]
    assert names(iter([files[3], tmp_path / "in"])) == [files[3], *files[:3]]


def test_an_archive_is_its_images(photo: Photo, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(photo("x.png"), "x.png")
    assert names(tmp_path / "a.tar") == names([tmp_path / "a.tar"]) == [f"{tmp_path / 'a.tar'}::x.png"]


def test_a_path_without_images_is_one_image_among_several_and_alone_an_error(photo: Photo, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    gone, empty, pattern = tmp_path / "gone.jpg", tmp_path / "empty", str(tmp_path / "*.webp")
    found = list(read_objects([gone, empty, photo("a.png"), pattern]))
    assert [str(data) if isinstance(data, ImageError) else "" for _, data in found] == [
        "no such file",
        f"no images in {empty} (looked for .jpg" + str(found[1][1]).partition(".jpg")[2],
        "",
        f"no file matches {pattern}",
    ]
    ((name, data),) = read_objects(gone)  # as in a list of one
    assert (name, str(data)) == (str(gone), "no such file")
    for location in (empty, pattern):
        with pytest.raises(UsageError, match=r"^no (images in|file matches)"):
            read_objects(location)


def test_a_name_with_brackets_is_a_file_where_there_is_one(photo: Photo) -> None:
    assert names(photo("face[1].png"))[0].endswith("face[1].png")


def test_a_generator_is_read_as_its_images_are_taken() -> None:
    taken = []

    def frames() -> Iterator[np.ndarray]:
        for i in range(5):
            taken.append(i)
            yield np.full((9, 7, 3), i, np.uint8)

    found = read_objects(frames())
    assert next(found)[0] == "item 0"
    assert taken == [0]
    assert len(list(found)) == 4


def test_a_loader_of_batches_is_its_images() -> None:
    torch = pytest.importorskip("torch")
    images = [torch.from_numpy(PIXELS).permute(2, 0, 1) for _ in range(5)]
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    np.testing.assert_array_equal(pictures(loader), [PIXELS] * 5)


def test_an_entry_and_a_pil_image_keep_their_names(photo: Photo) -> None:
    file = photo("a.png")
    with Image.open(file) as image:
        assert names([Entry("shard.tar::1", file), image, Image.fromarray(PIXELS)]) == [
            "shard.tar::1",
            str(file),
            "item 2",
        ]
    assert names(Entry("shard.tar::1", file)) == ["shard.tar::1"]


def test_a_column_of_paths_is_a_list_of_them(photo: Photo) -> None:
    files = [str(photo(f"{i}.png", seed=i)) for i in range(3)]
    for column in (np.array(files), np.array([Path(file) for file in files], object)):
        assert names(column) == files
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    table = pandas.DataFrame({"rating": [1.0, 2, 3], "path": files}, index=[7, 8, 9])
    for column in (table["path"], table["path"].astype("category"), table.path.map(Path), pyarrow.array(files)):
        assert names(column) == files


def test_a_table_names_its_columns_and_the_one_to_give(photo: Photo) -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {"rating": [1.0], "path": [str(photo("a.png"))]}
    message = r"^can't score a DataFrame with the columns rating, path: .* such as table\['path'\]$"
    with pytest.raises(UsageError, match=message):
        read_objects(pandas.DataFrame(columns))
    with pytest.raises(UsageError, match=r"^can't score a Table with the columns rating, path"):
        read_objects(pyarrow.table(columns))


REFUSED: dict[str, tuple[Any, str]] = {
    "3x3x3": (np.zeros((3, 3, 3), np.uint8), r"an array \[3, 3, 3\] of uint8: its first or its last axis could be"),
    "3xHx3": (np.zeros((3, 40, 3), np.uint8), "its first or its last axis could be the channels"),
    "a stack of 3x3x3": (np.zeros((8, 3, 3, 3), np.uint8), "its first or its last axis could be the channels"),
    "two channels": (np.zeros((9, 7, 2), np.uint8), r"array \[9, 7, 2\] of uint8: neither its first nor its last axis"),
    "a stack of grey": (np.zeros((9, 50, 40), np.uint8), r"of grey images: \[N, H, W, 1\]"),
    "one axis": (np.zeros(500), r"an array \[500\] of float64; expected a path"),
    "no axis": (np.float32(3), r"an array \[\] of float32"),
    "five axes": (np.zeros((1, 1, 3, 8, 8), np.uint8), r"an array \[1, 1, 3, 8, 8\] of uint8; expected"),
    "int64": (np.zeros((9, 7, 3), np.int64), "of int64; expected uint8, 0 to 255, or float, 0 to 1"),
    "uint16": (np.zeros((9, 7, 3), np.uint16), "of uint16; expected uint8"),
    "bool": (np.zeros((9, 7), bool), "of bool; expected uint8"),
    "complex": (np.zeros((9, 7), complex), "of complex128; expected uint8"),
    "0 to 255": (np.full((9, 7, 3), 255.0), "of float64 from 255 to 255; expected 0 to 1: divide by 255"),
    "normalised": (np.full((3, 9, 7), -1.5), r"from -1\.5 to -1\.5; expected 0 to 1: undo the normalisation"),
    "just outside": (np.full((9, 7, 3), 1.01), r"from 1\.01 to 1\.01; expected 0 to 1"),
    "NaN": (np.full((9, 7, 3), np.nan), "values that are not finite"),
    "infinite": (np.full((9, 7, 3), np.inf), "values that are not finite"),
    "objects": (np.full((2, 2), "a.jpg", object), r"an array \[2, 2\] of object; expected uint8"),
    "None": (None, "None; expected a path, folder"),
    "a number": (7, "an int; expected a path"),
    "a dict": ({"image": PIXELS, "label": 3}, "a dict with the keys image, label: give the image alone"),
    "text": (io.StringIO("a.jpg"), "a file opened as text; open it with 'rb'"),
    "read of text": (OnlyRead("a.jpg"), r"an OnlyRead whose read\(\) gives a str"),
}


@pytest.mark.parametrize(("item", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_image_is_refused_at_once_alone_and_in_a_list_and_from_a_generator(item: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"^can't score {message}|^can't score .*{message}"):
        read_objects(item)
    with pytest.raises(UsageError, match=rf"^item 1 is .*{message}"):
        list(read_objects([PIXELS, item]))
    found = read_objects(each for each in [PIXELS, item])
    next(found)
    with pytest.raises(UsageError, match=rf"^item 1 is .*{message}"):
        next(found)


def test_types_and_shapes_in_a_list_are_checked_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match=r"^item 2 is None"):
        read_objects([PIXELS, b"not yet read", None])
    with pytest.raises(UsageError, match=r"^item 1 is an array \[3, 3, 3\]"):
        read_objects((PIXELS, np.zeros((3, 3, 3), np.uint8)))
    with pytest.raises(UsageError, match=r"^item 0 is a tuple of 2: give the image alone"):
        read_objects([(PIXELS, 3.5)])


def test_a_stacks_values_are_checked_before_its_first_image() -> None:
    stack = np.zeros((4, 9, 7, 3), np.float32)
    stack[3, 0, 0, 0] = 2
    with pytest.raises(UsageError, match="from 0 to 2; expected 0 to 1"):
        read_objects(stack)


def test_an_array_without_pixels_is_one_image_that_can_not_be_read() -> None:
    for array in (np.zeros((0, 5, 3), np.uint8), np.zeros((0, 5)), np.zeros((3, 0, 0), np.float32)):
        ((_, data),) = read_objects([array])
        assert isinstance(data, ImageError)
        assert str(data) == "no pixels"


def test_torch_is_not_imported_for_it() -> None:
    import subprocess

    program = (
        "import sys, numpy; from mdnet_rt.sources.objects import read_objects; "
        "list(read_objects(numpy.zeros((9, 7, 3), 'uint8'))); print({'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=os.sep)
    assert done.stdout == "set()\n"
