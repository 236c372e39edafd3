"""Which files a list of arguments means, and in which order."""

from __future__ import annotations

import errno
import io
import os
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mdnet_engines.errors import UsageError, printable
from mdnet_rt.sources.entry import Entry, archive_kind, is_url, natural_key
from mdnet_rt.sources.locations import find_images, find_locations, read_list, read_locations


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


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=()) | st.sampled_from("ab012/."), max_size=8)


def by_parts(path: Path) -> tuple[object, ...]:
    """The order that `natural_key` has in one string, spelt out: by folder, numbers by value and before text, name."""
    return tuple((by_value(part), part) for part in path.parts)


def by_value(name: str) -> tuple[tuple[int, int, str], ...]:
    runs = [run for run in re.split("([0-9]+)", name) if run]
    return tuple((0, int(run), "") if run[0] in "0123456789" else (1, 0, run) for run in runs)


@given(st.lists(TEXT, unique=True))
@example(["2/a", "02/b"])
def test_the_natural_order_is_that_of_the_parts_of_names(texts: list[str]) -> None:
    paths = list({Path(text) for text in texts})
    assert sorted(paths, key=natural_key) == sorted(paths, key=by_parts)


FILE_NAME = st.text(st.sampled_from("a0129.é \x01\udcff"), min_size=1, max_size=4).filter(lambda name: name[0] != ".")


@given(st.lists(st.lists(FILE_NAME, min_size=1, max_size=3), min_size=1, max_size=12))
@example([["02", "b"], ["2", "a"]])
def test_a_folder_is_walked_in_the_natural_order_of_its_paths(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("walk")
    expected = set()
    for *folders, name in files:
        file = root.joinpath(*folders, name + "x.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        expected.add(file)
    assert list(map(Path, find_locations([root]))) == sorted(expected, key=by_parts)


@given(st.lists(TEXT, unique=True))
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


def listed(text: bytes, *, null: bool = False) -> list[bytes]:
    return [os.fsencode(location) for location in read_list(io.BytesIO(text), null=null)]


LONG = b"n" * 2**20


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (b"", []),
        (b"a.jpg\nb.jpg\n", [b"a.jpg", b"b.jpg"]),
        (b"a.jpg\nb.jpg", [b"a.jpg", b"b.jpg"]),
        (b"a.jpg\r\nb.jpg\r\n", [b"a.jpg", b"b.jpg"]),
        (b"\n\na.jpg\n\n\r\nb.jpg\n\n", [b"a.jpg", b"b.jpg"]),
        (b" a.jpg \n\t\n", [b" a.jpg ", b"\t"]),
        (b"caf\xe9.jpg\n\xff\xfe\n", [b"caf\xe9.jpg", b"\xff\xfe"]),
        (b"a\x0bb\x0c\x1c\xc2\x85\xe2\x80\xa8.jpg\n", [b"a\x0bb\x0c\x1c\xc2\x85\xe2\x80\xa8.jpg"]),
        (b"a\0b.jpg\n", [b"a\0b.jpg"]),
        (LONG + b"\n" + LONG, [LONG, LONG]),
        (b"s3://bucket/a.jpg\n*.jpg\n", [b"s3://bucket/a.jpg", b"*.jpg"]),
        (b"a.jpg\na.jpg\n", [b"a.jpg", b"a.jpg"]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_list_is_read_line_by_line_and_nothing_is_left_out_or_expanded(text: bytes, lines: list[bytes]) -> None:
    assert listed(text) == lines


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"", []),
        (b"\0\0", []),
        (b"a.jpg\0b.jpg\0", [b"a.jpg", b"b.jpg"]),
        (b"a.jpg\0b.jpg", [b"a.jpg", b"b.jpg"]),
        (b"two\nlines\r\n.jpg\0\xff\0", [b"two\nlines\r\n.jpg", b"\xff"]),
        (LONG + b"\0" + LONG + b"\0", [LONG, LONG]),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_names_that_end_in_nul_may_have_anything_else_in_them(text: bytes, names: list[bytes]) -> None:
    assert listed(text, null=True) == names


@given(st.lists(st.binary(min_size=1).filter(lambda raw: b"\0" not in raw)), st.integers(1, 9))
def test_names_that_end_in_nul_come_back_however_the_pipe_cuts_them(names: list[bytes], size: int) -> None:
    class Pipe(io.BytesIO):
        def read1(self, _: int | None = -1) -> bytes:
            return super().read1(size)

    text = b"".join(name + b"\0" for name in names)
    assert [os.fsencode(location) for location in read_list(Pipe(text), null=True)] == names


@pytest.mark.parametrize("null", [False, True])
def test_a_list_from_a_pipe_is_read_as_it_comes(null: bool) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stream, os.fdopen(write, "wb", buffering=0) as out:
        locations = read_list(stream, null=null)
        for name in (b"a.jpg", b"b.jpg"):
            out.write(name + (b"\0" if null else b"\n"))
            assert os.fsencode(next(locations)) == name  # before the next is written


@pytest.mark.parametrize("null", [False, True])
def test_a_byte_order_mark_is_no_part_of_the_first_name(null: bool) -> None:
    end = b"\0" if null else b"\r\n"
    assert listed("a.jpg".encode("utf-8-sig") + end + b"\xef\xbb\xbfb.jpg", null=null) == [
        b"a.jpg",
        b"\xef\xbb\xbfb.jpg",
    ]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("null", [False, True])
def test_a_list_in_utf_16_is_refused_by_name(encoding: str, null: bool) -> None:
    with pytest.raises(UsageError, match=r"^the list is in UTF-16; save it as UTF-8$"):
        listed("\ufeffa.jpg\n".encode(encoding), null=null)


def test_whatever_a_list_names_is_an_entry_of_that_name(tree: Path) -> None:
    (tree / "folder.tar").mkdir()
    names = ["photos/img2.JPG", "gone.jpg", "photos", "folder.tar", "", "n" * 5000, "a\0b.jpg", "*.jpg"]
    assert list(read_locations(names)) == [Entry(name, Path(name)) for name in names]


def test_a_file_that_is_named_twice_in_other_words_is_kept_once_and_links_to_it_are_files_of_their_own(
    tree: Path,
) -> None:
    link = tree / "photos" / "link.jpg"
    link.symlink_to("img10.jpg")
    several = [
        str(tree / "photos" / "img10.jpg"),
        "photos/img10.jpg",
        "photos/./../photos/img10.jpg",
        "photos/link.jpg",
    ]
    assert names(*several) == [several[0], "photos/link.jpg"]


def test_a_folder_is_walked_while_its_images_are_taken(tree: Path) -> None:
    locations = find_locations(["photos", "photos/album"])
    assert next(locations) == "photos/album/a.webp"
    (tree / "photos" / "album" / "deep" / "new.png").touch()
    assert "photos/album/deep/new.png" in list(locations)


def test_the_names_of_a_large_folder_are_held_a_folder_at_a_time(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for file in range(100):
            (tmp_path / str(folder) / f"{file}{'n' * 200}.jpg").touch()
    tracemalloc.start()
    try:
        assert sum(1 for _ in find_locations([tmp_path])) == 2000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2000 * 200 / 2  # all names, without what Python adds to each, are 400 kB


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a.jpg", True),
        ("HTTPS://host/a", True),
        ("git+ssh://x/y", True),
        ("a://b", False),  # a drive of Windows
        ("C:\\x.jpg", False),
        ("/a/b://c", False),
        ("a.jpg", False),
        ("://a", False),
        ("", False),
    ],
)
def test_a_url_has_a_scheme(text: str, url: bool) -> None:
    assert is_url(text) is url


@pytest.mark.parametrize("name", ["a.tar", "A.TAR", "a.tar.gz", "a.tgz", "a.Parquet", "folder/.tar"])
def test_an_archive_is_known_by_its_name(name: str) -> None:
    assert archive_kind(name)
    assert not archive_kind(name + ".txt")
    assert not archive_kind(name.replace(".", "_"))
