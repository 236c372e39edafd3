"""Images in tar archives: each member's bytes, whatever its name; nothing unpacked; no end that passes in silence."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import random
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mdnet_rt.images.preprocess import ImageError
from mdnet_rt.sources import archives
from mdnet_rt.sources.archives import read_archive
from mdnet_rt.sources.entry import Entry
from mdnet_rt.sources.locations import read_locations

JPEG = b"not really a JPEG, but nothing here decodes it" * 20


def info(name: str, size: int = 0, type: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, type, target
    return member


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                archive.addfile(info(member[0], len(member[1])), io.BytesIO(member[1]))
    return stream.getvalue()


def entries(data: bytes, name: str = "a.tar") -> list[Entry]:
    return list(read_archive(name, lambda: io.BytesIO(data)))


def told(data: bytes) -> list[tuple[str, bytes | str]]:
    """Names with bytes or the reason, the archive's own name left out."""
    return [
        (entry.name.removeprefix("a.tar::"), str(entry.data) if isinstance(entry.data, ImageError) else entry.data)
        for entry in entries(data)
    ]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress], ids=["plain", "gz", "bz2"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_come_in_the_archives_order_by_their_suffix(format: int, pack: type) -> None:
    data = tar(
        ("b.jpg", JPEG),
        ("notes.txt", b"x" * 1000),
        ("a/10.PNG", b"png"),
        ("a/2.webp", b""),
        ("._b.jpg", b"x"),
        ("a/.hidden.tiff", b"x"),
        ("jpg", b"x"),
        info("folder.jpg", type=tarfile.DIRTYPE),
        ("last.tif", JPEG),
        format=format,
    )
    expected = [("b.jpg", JPEG), ("a/10.PNG", b"png"), ("a/2.webp", b""), ("last.tif", JPEG)]
    assert told(pack(data)) == expected


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
@pytest.mark.parametrize(
    "name",
    [
        "long/" * 60 + "é.jpg",
        "two\nlines.jpg",
        'say "hi", 😀.jpg',
        " .jpg",
        os.fsdecode(b"caf\xe9.jpg"),
        "../../outside.jpg",
        "/etc/absolute.jpg",
        "a/../../b.jpg",
        "c:\\x.jpg",
        "a::b.jpg",
    ],
    ids=ascii,
)
def test_a_members_name_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: int, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar((name, JPEG), format=format))
    assert list(read_locations(["a.tar"])) == [Entry(f"a.tar::{name}", JPEG)]
    assert os.listdir(tmp_path) == ["a.tar"]


def test_members_of_the_same_name_are_all_there() -> None:
    assert told(tar(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"))) == [
        ("a.jpg", b"1"),
        ("b.jpg", b"2"),
        ("a.jpg", b"3"),
    ]


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_rows_and_not_followed(type: bytes) -> None:
    data = tar(("a.jpg", b"1"), info("b.jpg", type=type, target="a.jpg"), ("c.jpg", b"3"))
    assert told(data) == [("a.jpg", b"1"), ("b.jpg", "a link or a special file in an archive"), ("c.jpg", b"3")]


def sparse() -> bytes:
    """Old GNU sparse: 3000 zeros, then 4 bytes."""
    header = bytearray(info("hole.jpg", size=512, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (3000, 4)
    header[482] = 0
    header[483:495] = b"%011o\0" % 3004
    header[124:136] = b"%011o\0" % 4
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"data".ljust(512, b"\0")


def test_a_sparse_member_is_read_with_its_holes() -> None:
    assert told(sparse() + tar(("after.jpg", JPEG))) == [("hole.jpg", b"\0" * 3000 + b"data"), ("after.jpg", JPEG)]


def test_a_sparse_member_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 3003)
    assert told(sparse() + tar(("after.jpg", JPEG))) == [
        ("hole.jpg", "3004 bytes exceed the limit of 3003"),
        ("after.jpg", JPEG),
    ]


def test_a_member_over_the_limit_is_a_row_and_those_behind_it_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    data = tar(("large.jpg", bytes(1001)), ("fits.jpg", bytes(1000)))
    assert told(data) == [("large.jpg", "1001 bytes exceed the limit of 1000"), ("fits.jpg", bytes(1000))]


FILES = [("a.jpg", JPEG), ("notes.txt", JPEG * 3), ("b" * 150 + ".jpg", JPEG), ("c.jpg", b"")]
IMAGES = [(name, data) for name, data in FILES if name.endswith("jpg")]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_an_archive_cut_anywhere_gives_what_is_whole_and_then_says_so(format: int) -> None:
    data = tar(*FILES, format=format)
    end = data.rindex(b"c.jpg") // 512 * 512 + 512  # c.jpg is empty: its header is its end
    for cut in range(0, end + 1, 61):
        *images, last = told(data[:cut])
        assert images == IMAGES[: len(images)], f"cut at byte {cut}"
        assert last[0] == "a.tar", f"cut at byte {cut}"
        count = f"{len(images)} image{'' if len(images) == 1 else 's'}"
        assert last[1].endswith(f"(after {count})"), f"cut at byte {cut}"  # type: ignore[union-attr]
    assert told(data[:end]) == [*IMAGES, ("a.tar", "no end mark, the archive may be cut (after 3 images)")]
    assert told(data[: end + 512]) == IMAGES


def test_a_cut_archive_keeps_every_image_that_is_whole() -> None:
    data = tar(*[(f"{i}.jpg", JPEG) for i in range(20)])
    each = data.index(b"1.jpg")  # header and data of one
    for whole in range(20):
        for cut in (each * whole + 1, each * whole + 511, each * whole + 513, each * (whole + 1) - 513):
            assert len(told(data[:cut])) == whole + 1


def test_a_gzip_stream_cut_anywhere_says_so() -> None:
    noise = random.Random(0).randbytes
    files = [(f"{i}.jpg", noise(3000)) for i in range(5)]
    data = gzip.compress(tar(*files))
    for cut in [*range(30), *range(30, len(data), 97), *range(len(data) - 9, len(data))]:
        *images, last = told(data[:cut])
        assert images == files[: len(images)]
        assert "image" in last[1]
        assert last[0] == "a.tar"
    assert told(data) == files


def test_a_gzip_stream_that_was_altered_says_so() -> None:
    noise = random.Random(0).randbytes
    files = [(f"{i}.jpg", noise(3000)) for i in range(5)]
    data = gzip.compress(tar(*files), 0)  # stored: nothing but the sum can tell
    altered = data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]
    assert told(altered)[-1][0] == "a.tar"
    assert "CRC" in told(altered)[-1][1]  # type: ignore[operator]


def test_gzip_in_several_parts_is_read_whole() -> None:
    data = tar(*[(f"{i}.jpg", JPEG) for i in range(10)])
    parts = b"".join(gzip.compress(data[start : start + 4000]) for start in range(0, len(data), 4000))
    assert told(parts) == [(f"{i}.jpg", JPEG) for i in range(10)]


@pytest.mark.parametrize("place", ["checksum", "zeros", "noise"])
def test_a_damaged_header_in_mid_file_does_not_end_it_in_silence(place: str) -> None:
    data = bytearray(tar(*[(f"{i}.jpg", JPEG) for i in range(5)]))
    start = data.index(b"3.jpg")
    damage = {"checksum": b"!", "zeros": bytes(512), "noise": random.Random(1).randbytes(512)}[place]
    data[start : start + len(damage)] = damage
    *images, last = told(bytes(data))
    assert images == [(f"{i}.jpg", JPEG) for i in range(3)]
    assert last[0] == "a.tar"
    assert "damaged" in last[1]  # type: ignore[operator]


def test_a_second_archive_behind_the_first_is_not_lost_in_silence() -> None:
    one = tar(("a.jpg", b"1"))
    assert told(one + one)[-1] == ("a.tar", "more data behind an end mark, the archive may be damaged (after 1 image)")


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**80])
def test_a_member_that_declares_more_than_there_is_ends_soon(name: str, size: int) -> None:
    data = info(name, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    *_, last = told(data)
    assert last[0] == "a.tar"
    assert "may be cut" in last[1]  # type: ignore[operator]


def pax(fields: dict[str, str], size: int = 0) -> bytes:
    """The headers of a member, without its data."""
    member = info("a.jpg", size)
    member.pax_headers = fields
    return member.tobuf(tarfile.PAX_FORMAT)


HOLES = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9", "GNU.sparse.name": "a.jpg"}
OLD_HOLES = bytearray(info("a.jpg", size=2**40, type=tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
OLD_HOLES[386:410], OLD_HOLES[482] = b"%011o\0%011o\0" % (0, 1), 1
OLD_HOLES[148:156] = b"%06o\0 " % (sum(OLD_HOLES) - sum(OLD_HOLES[148:156]) + 8 * ord(" "))


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize(
    ("head", "block"),
    [
        *[(info("name", size=2**40, type=type).tobuf(tarfile.GNU_FORMAT), b"a" * 512) for type in (b"L", b"K")],
        *[(info("name", size=2**40, type=type).tobuf(tarfile.GNU_FORMAT), b"a" * 512) for type in (b"x", b"g", b"X")],
        (pax(HOLES, 2**40) + b"999999999999\n" * 512, b"1\n" * 256),
        (bytes(OLD_HOLES), (b"%011o\0%011o\0" % (0, 1)) * 21 + b"\1" * 8),
        (b"", info("name", size=0, type=b"L").tobuf(tarfile.GNU_FORMAT)),
    ],
    ids=["long name", "long link", "pax", "global pax", "Solaris' pax", "holes", "old holes", "names of names"],
)
def test_a_header_that_would_fill_the_memory_is_not_read(head: bytes, block: bytes) -> None:
    class Endless(io.RawIOBase):
        """The head, then blocks for as long as someone reads."""

        def __init__(self) -> None:
            self.rest, self.given = head, 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            self.rest = self.rest or block * 20
            data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
            buffer[: len(data)] = data
            self.given += len(data)
            assert self.given < 2 * 2**20, "it is being read"
            return len(data)

    (entry,) = read_archive("a.tar", Endless)  # type: ignore[arg-type]
    assert str(entry.data).startswith(("damaged archive (a header of more than", "maximum recursion depth"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no end mark"),
        (b"\0", "no end mark"),
        (b"text" * 300, "damaged archive"),
        (b"\x1f\x8b", "ended before"),
        (b"\x1f\x8b\x08\0" + b"x" * 600, "invalid"),
        (b"BZh91AY&SY" + b"x" * 600, "invalid compressed data"),
        (b"\xfd7zXZ" + b"x" * 600, "invalid compressed data"),
        (bytes(random.Random(0).randbytes(5000)), "damaged archive"),
    ],
    ids=["empty", "a byte", "text", "gzip's magic", "bad gzip", "bad bz2", "bad xz", "noise"],
)
def test_what_is_no_archive_is_one_row(data: bytes, reason: str) -> None:
    ((name, told_reason),) = told(data)
    assert name == "a.tar"
    assert reason.lower() in told_reason.lower()  # type: ignore[union-attr]
    assert told_reason.endswith(" (after 0 images)")  # type: ignore[arg-type]


def test_an_archive_without_images_has_no_rows() -> None:
    assert told(tar(("notes.txt", b"x"))) == []
    assert told(bytes(10240)) == []


def test_archives_that_cannot_be_opened_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.tar")
    Path("folder.tar").mkdir()
    names = ["gone.tar", "pipe.tar", "folder.tar", "n" * 300 + ".tgz", "nul\0.tar", "gone.parquet", "gone.tar/a.tar"]
    found = {entry.name: str(entry.data) for entry in read_locations(names)}
    assert list(found) == names
    assert found["gone.tar"] == found["gone.parquet"] == found["gone.tar/a.tar"] == "no such file"
    assert found["pipe.tar"].startswith("not a regular file")
    assert found["folder.tar"] == "folder.tar"  # which decoding refuses, as every folder in a list
    assert found[names[3]].startswith("file name too long")


def test_a_large_archive_takes_no_memory_for_its_members() -> None:
    block = tar(("a/some/name.jpg", b"x"))[:1024]

    class Archive(io.RawIOBase):
        """`count` members, made as they are read."""

        def __init__(self, count: int) -> None:
            self.left, self.rest, self.end = count, b"", bytes(10240)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            if not self.rest:
                many = min(self.left, 64)
                self.left -= many
                self.rest = block * many
            if not self.rest:
                self.rest, self.end = self.end, b""
            data, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
            buffer[: len(data)] = data
            return len(data)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            stream: Iterator[Entry] = read_archive("a.tar", lambda: Archive(count))  # type: ignore[arg-type,return-value]
            assert sum(entry.data == b"x" for entry in stream) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few = peak(1_000)
    assert peak(20_000) < few + 200_000  # 10 bytes a member; tarfile's own list would take some 500
