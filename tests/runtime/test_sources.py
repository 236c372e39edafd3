"""Which files a list of arguments means, and in which order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdnet_engines.errors import UsageError
from mdnet_rt.sources import find_images, natural_key, printable


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with images (empty files: nothing here opens them) and other things."""
    for name in (
        "photos/img10.jpg",
        "photos/img2.JPG",
        "photos/notes.txt",
        "photos/.hidden.jpg",
        "photos/._img2.jpg",
        "photos/.cache/thumb.png",
        "photos/album/b.TIFF",
        "photos/album/a.webp",
        "photos/album/deep/c.jpeg",
        "photos/odd[1].jpg",
        "photos/face.dat",
        "empty/readme.txt",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*patterns: str) -> list[str]:
    return [str(path) for path in find_images(patterns)]


IN_PHOTOS = [
    "photos/album/a.webp",
    "photos/album/b.TIFF",
    "photos/album/deep/c.jpeg",
    "photos/img2.JPG",
    "photos/img10.jpg",
    "photos/odd[1].jpg",
]


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["photos"], IN_PHOTOS),
        (["photos/"], IN_PHOTOS),
        (["photos/**"], IN_PHOTOS),
        (["."], IN_PHOTOS),
        (["photos/img2.JPG"], ["photos/img2.JPG"]),
        (["photos/face.dat", "photos/notes.txt"], ["photos/face.dat", "photos/notes.txt"]),
        (["photos/.hidden.jpg"], ["photos/.hidden.jpg"]),
        (["photos/*.jpg"], ["photos/img10.jpg", "photos/odd[1].jpg"]),
        (["photos/img?.JPG"], ["photos/img2.JPG"]),
        (["photos/*.dat"], ["photos/face.dat"]),
        (["photos/.*.jpg"], ["photos/._img2.jpg", "photos/.hidden.jpg"]),
        (["*/album/[ab].*"], ["photos/album/a.webp", "photos/album/b.TIFF"]),
        (["photos/**/*.jpeg"], ["photos/album/deep/c.jpeg"]),
        (["**/c.jpeg"], ["photos/album/deep/c.jpeg"]),
        (["photos/al*"], IN_PHOTOS[:3]),
        (["photos/odd[1].jpg"], ["photos/odd[1].jpg"]),  # the literal name comes before the pattern
        (["photos/img10.jpg", "photos/img2.JPG"], ["photos/img10.jpg", "photos/img2.JPG"]),
        (["photos/img10.jpg", "photos"], ["photos/img10.jpg", *[p for p in IN_PHOTOS if "10" not in p]]),
        (["photos", "./photos/../photos/img2.JPG", "photos/album"], IN_PHOTOS),
    ],
    ids=" ".join,
)
def test_arguments_expand_to_images(patterns: list[str], expected: list[str]) -> None:
    assert names(*patterns) == expected


def test_an_absolute_pattern_gives_absolute_paths(tree: Path) -> None:
    assert find_images([tree / "ph*" / "*.JPG"]) == [tree / "photos" / "img2.JPG"]


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("photos/img3.jpg", "photos/img3.jpg does not exist"),
        ("empty", r"no images in empty \(looked for \.jpg"),
        ("photos/*.gif", r"no file matches photos/\*\.gif"),
        ("nowhere/**/*.jpg", "no file matches nowhere"),
        ("empt*", r"no images in empt\*"),
        ("photos/notes.txt/*.jpg", "no file matches"),
        ("", "an empty path"),
        ("new\nline.jpg", r"new\\nline\.jpg does not exist"),
    ],
)
def test_what_is_not_there_is_a_one_line_usage_error(pattern: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}") as caught:
        find_images(["photos", pattern])
    assert "\n" not in str(caught.value)


def test_links_to_files_count_and_links_to_folders_are_not_entered(tree: Path) -> None:
    folder = tree / "linked"
    folder.mkdir()
    (folder / "face.jpg").symlink_to(tree / "photos" / "img2.JPG")
    (folder / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tree)
    assert names("linked") == ["linked/face.jpg"]
    assert names("linked/**/*.jpg") == ["linked/face.jpg"]
    assert names("linked/up/photos/album/a.webp") == ["linked/up/photos/album/a.webp"]


def test_broken_and_looping_links_are_kept_to_become_error_rows(tree: Path) -> None:
    folder = tree / "linked"
    folder.mkdir()
    (folder / "gone.jpg").symlink_to("no-such-file")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "gone.txt").symlink_to("no-such-file")
    assert names("linked") == ["linked/gone.jpg", "linked/loop.jpg"]
    assert names("linked/gone.jpg") == ["linked/gone.jpg"]


@pytest.mark.usefixtures("tree")
def test_a_folder_called_like_an_image_is_a_folder() -> None:
    Path("photos/x.jpg").mkdir()
    Path("photos/x.jpg/inside.png").touch()
    assert names("photos/x.jpg") == ["photos/x.jpg/inside.png"]
    assert "photos/x.jpg/inside.png" in names("photos")
    assert "photos/x.jpg" not in names("photos")


@pytest.mark.usefixtures("deadline")
def test_a_fifo_is_skipped_in_a_folder_and_kept_when_named(fifo: Path) -> None:
    (fifo.parent / "a.jpg").touch()
    assert find_images([fifo.parent]) == [fifo.parent / "a.jpg"]
    assert find_images([fifo]) == [fifo]


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    Path(os.fsdecode(raw)).touch()
    for pattern in (tmp_path, tmp_path / "*.jpg", os.fsdecode(raw)):
        assert [os.fsencode(path) for path in find_images([pattern])] == [raw]


def test_a_folder_that_cannot_be_read_is_not_skipped_in_silence(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    # Root, which tests may run as, reads everything: the refusal is staged.
    def refuse_album(path: str | os.PathLike[str]) -> object:
        if os.fspath(path).endswith("album"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_album)
    for pattern in ("photos", "photos/album/*"):
        with pytest.raises(UsageError, match="can't read the folder photos/album: permission denied"):
            find_images([pattern])


def test_numbers_in_names_sort_by_value() -> None:
    shuffled = ["b/1.jpg", "a10.jpg", "a/x.jpg", "a2.jpg", "a²3.jpg", "a02.jpg", "a1b9.jpg", "a1b10.jpg", "7"]
    assert sorted(map(Path, shuffled), key=natural_key) == [
        Path(name)
        for name in ["7", "a/x.jpg", "a1b9.jpg", "a1b10.jpg", "a02.jpg", "a2.jpg", "a10.jpg", "a²3.jpg", "b/1.jpg"]
    ]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=8), unique=True))
def test_every_set_of_names_has_one_order(texts: list[str]) -> None:
    paths = list({Path(text) for text in texts})
    backwards = paths[::-1]
    assert sorted(paths, key=natural_key) == sorted(backwards, key=natural_key)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain é.jpg", "plain é.jpg"),
        ("two\nlines\t", r"two\nlines\t"),
        ("\x1b[31mred", r"\x1b[31mred"),
        (os.fsdecode(b"caf\xe9.jpg"), r"caf\xe9.jpg"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
    ],
)
def test_names_are_shown_on_one_line_without_control_characters(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(name).encode()
