"""`mdnet-rt score` on what a large folder really holds, and worse: every image has exactly one row, with its reason."""

from __future__ import annotations

import csv
import io
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mdnet_rt.rows.encoding import COLUMNS
from mdnet_rt.sources.entry import natural_key

DEADLINE = 60  # seconds after which a run that should have ended has not
OPTIONS = ("--backend", "onnxruntime-cpu", "--threads", "1")
PROGRAM = """
import pathlib, sys
from mdnet_rt.cli.main import main
try:
    main(sys.argv[2:])
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path(sys.argv[1]).write_text(status.partition("VmHWM:")[2].split()[0])
"""


@dataclass(frozen=True)
class Run:
    """A run that has ended. `peak`: the most memory it had, in bytes."""

    code: int
    stdout: bytes
    stderr: str
    peak: int = 0


def run(*arguments: object, stdin: bytes = b"", limit: int | None = None) -> Run:
    """`mdnet-rt` in a process of its own. `limit`: no file may grow larger, as on a full disk."""
    done = subprocess.run(
        [sys.executable, "-m", "mdnet_rt.cli.main", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=DEADLINE,
        preexec_fn=None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    return Run(done.returncode, done.stdout, done.stderr.decode())


def run_measured(peak: Path, *arguments: object) -> Run:
    """As `run`, with its peak memory, for which the file `peak` is used. (A child's `ru_maxrss` has its parent's.)"""
    command = [sys.executable, "-c", PROGRAM, str(peak), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE)
    return Run(done.returncode, done.stdout, done.stderr.decode(), int(peak.read_text()) * 1024)


def rows_of(file: Path | bytes) -> list[dict[str, str]]:
    text = (file if isinstance(file, bytes) else file.read_bytes()).decode("utf-8", "surrogateescape")
    csv.field_size_limit(2**31 - 1)
    header, *rows = csv.reader(io.StringIO(text, newline=""))
    assert tuple(header) == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


@dataclass(frozen=True)
class Seed:
    """A file, and what its row says: the status, how the reason begins, and the size."""

    suffix: str
    data: bytes
    status: str = "ok"
    reason: str = ""
    size: tuple[str, str] = ("", "")


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def animation(format: str) -> bytes:
    frames = [noise(24, 20, seed) for seed in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


def good_seeds() -> list[Seed]:
    def good(suffix: str, data: bytes, warning: str = "") -> Seed:
        width, height = (9, 9) if data is text_bomb() else Image.open(io.BytesIO(data)).size
        return Seed(suffix, data, reason=warning, size=(str(width), str(height)))

    image = noise(48, 40)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = np.random.default_rng(0).integers(1, 2**16, (30, 30)).astype(np.uint16)
    return [
        good(".jpg", encoded(image, "JPEG")),
        good(".JPEG", encoded(image, "JPEG", progressive=True, exif=turned)),
        good(".png", encoded(image, "PNG")),
        good(".webp", encoded(image, "WEBP")),
        good(".bmp", encoded(image, "BMP")),
        good(".tif", encoded(image, "TIFF")),
        good(".tiff", encoded(image, "TIFF", compression="tiff_lzw")),
        good(".png", encoded(noise(1, 1), "PNG"), "one flat colour"),
        good(".png", encoded(noise(1, 20_000), "PNG")),
        good(".png", text_bomb(), "one flat colour"),
        good(".webp", animation("WEBP")),
        good(".png", animation("GIF")),  # of the wrong extension, too
        good(".jpg", encoded(image, "PNG")),
        good(".png", encoded(image, "JPEG")),
        good(".jpg", encoded(image.convert("CMYK"), "JPEG", icc_profile=profile)),
        good(".png", encoded(Image.fromarray(grey16), "PNG")),
        good(".tif", encoded(Image.fromarray(grey16), "TIFF")),
        good(".png", encoded(image.convert("RGBA"), "PNG")),
        good(".png", encoded(image.convert("P"), "PNG")),
        good(".jpg", encoded(image, "JPEG") + b"trailing junk" * 5000),
        good(".jpg", encoded(image, "JPEG", comment=b"x" * 60_000)),
    ]


def bad_seeds(png_declaring: Callable[[int, int], bytes]) -> list[Seed]:
    png, jpeg, webp = (encoded(noise(48, 40), format) for format in ("PNG", "JPEG", "WEBP"))
    random = np.random.default_rng(1)
    at = png.index(b"IDAT") + 300
    black = encoded(Image.new("RGB", (9, 9)), "PNG")
    return [
        Seed(".jpg", b"", "unreadable", "empty file"),
        Seed(".png", png[: len(png) // 2], "unreadable", "truncated ("),
        Seed(".jpg", jpeg[: len(jpeg) // 2], "unreadable", "truncated ("),
        Seed(".webp", webp[: len(webp) // 2], "unreadable", ""),
        Seed(".jpg", jpeg[:20], "unreadable", ""),
        Seed(".jpg", random.bytes(3000), "unreadable", "not an image"),
        Seed(".png", png[:60] + random.bytes(3000), "unreadable", ""),
        Seed(".bmp", b"this is text, whatever its name says\n" * 9, "unreadable", "not an image"),
        Seed(".png", png[:at] + bytes([png[at] ^ 255]) + png[at + 1 :], "unreadable", "damaged ("),
        Seed(".png", png[:29] + b"\0\0\0\0" + png[33:], "unreadable", ""),  # the header's own checksum
        Seed(".png", png_declaring(60_000, 60_000), "unreadable", "60000x60000 pixels exceed the limit"),
        Seed(".webp", png_declaring(2**31 - 1, 2**31 - 1), "unreadable", "2147483647x2147483647 pixels exceed"),
        Seed(".tif", encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "unreadable", "floating-point"),
        Seed(".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "unreadable", "not an image"),
        Seed(".png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable", "not an image"),
        Seed(".png", black, "not_finite", "score is not finite (-inf)", ("9", "9")),
    ]


@cache
def text_bomb() -> bytes:
    """A PNG whose compressed comment is 100 MB."""
    png = encoded(Image.new("RGB", (9, 9), "white"), "PNG")
    body = b"zTXtcomment\0\0" + zlib.compress(bytes(100_000_000), 9)
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


NAMES = ["{}", "a,b {}", 'say "hi" {}', "two\nlines {}", "cr\r{}", "😀{}", "é {}\n", "caf\udce9 {}", "=cmd {}", "'{}'"]


@pytest.fixture
def seeds(tmp_path: Path, png_declaring: Callable[[int, int], bytes]) -> list[tuple[Path, Seed]]:
    """The seeds' files, every third a bad one, each good and bad one in turn."""
    folder = tmp_path / "seeds"
    folder.mkdir()

    def saved(kind: str, seeds: list[Seed]) -> Iterator[tuple[Path, Seed]]:
        for i, seed in enumerate(seeds):
            (folder / f"{kind}{i}").write_bytes(seed.data)
        return cycle([(folder / f"{kind}{i}", seed) for i, seed in enumerate(seeds)])

    good, bad = saved("good", good_seeds()), saved("bad", bad_seeds(png_declaring))
    return [next(bad if i % 3 == 2 else good) for i in range(10_000)]


def fill(folder: Path, seeds: list[tuple[Path, Seed]]) -> dict[str, Seed]:
    """Make a folder of images, hard links to the seeds' files; give their paths."""
    files = {}
    for i, (seed_file, seed) in enumerate(seeds):
        file = folder / f"{i % 7}" / (NAMES[i % len(NAMES)].format(i) + seed.suffix)
        if i < 7:
            file.parent.mkdir(parents=True)
        os.link(seed_file, file)
        files[os.fspath(file)] = seed
    return files


def check(rows: list[dict[str, str]], files: dict[str, Seed]) -> None:
    """Each file has its row, in order, and the row says what is right."""
    assert [row["path"] for row in rows] == sorted(files, key=natural_key)
    for row in rows:
        seed = files[row["path"]]
        assert row["status"] == seed.status, row
        assert row["reason"].startswith(seed.reason), row
        assert (row["score"] == "") == (row["status"] != "ok"), row
        assert row["reason"] != "" if row["status"] != "ok" else row["reason"] == seed.reason, row
        assert (row["width"], row["height"]) == seed.size, row
        assert row["score"] == "" or 1 < float(row["score"]) < 5, row
        assert row["model"] == "tiny fp32"


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


@needs_proc
def test_ten_thousand_files_a_third_of_them_broken_have_a_row_each_in_the_memory_of_a_thousand(
    shared_bundle: Path, seeds: list[tuple[Path, Seed]], tmp_path: Path
) -> None:
    runs = {}
    for count in (1_000, 10_000):
        files = fill(tmp_path / str(count), seeds[:count])
        output, peak = tmp_path / f"{count}.csv", tmp_path / f"{count}.peak"
        runs[count] = run_measured(
            peak, "score", tmp_path / str(count), "--bundle", shared_bundle, "-o", output, *OPTIONS
        )
        check(rows_of(output), files)
        failed = sum(seed.status != "ok" for seed in files.values())
        assert runs[count].code == 1
        assert runs[count].stderr.startswith(f"{count} images: {count - failed} scored (")
        assert f" with a warning), {failed} failed, " in runs[count].stderr
        assert runs[count].stderr.count("\n") == 1  # no warning of Pillow's or libtiff's among it
    # Measured: 15 MiB, which the allocator takes in the first 5,000 images or so; from 10,000 to 40,000 it is 3 more,
    # for the names of larger folders. To keep the pixels that were scored would add 27 MiB to that.
    assert runs[10_000].peak - runs[1_000].peak < 24 * 2**20


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_run_that_is_killed_and_resumed_has_the_rows_of_one_that_was_not(
    shared_bundle: Path, seeds: list[tuple[Path, Seed]], tmp_path: Path, suffix: str
) -> None:
    fill(tmp_path / "images", seeds[:600])
    whole, output = tmp_path / f"whole.{suffix}", tmp_path / f"scores.{suffix}"
    arguments = ["score", str(tmp_path / "images"), "--bundle", str(shared_bundle), *OPTIONS, "-o"]
    assert run(*arguments, whole).code == 1
    partial = Path(f"{output}.partial")
    kills = 0
    for rows in (1, 300):
        more = ["--resume"] if partial.exists() else []
        process = subprocess.Popen(
            [sys.executable, "-m", "mdnet_rt.cli.main", *arguments, str(output), *more], stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"tiny fp32") < rows):
            time.sleep(0.005)
        process.kill()
        kills += process.wait(DEADLINE) == -signal.SIGKILL
    assert kills, "no run was still under way"
    assert run(*arguments, output, "--resume").code == 1
    assert output.read_bytes() == whole.read_bytes()


@pytest.fixture
def specials(tmp_path: Path) -> Iterator[Path]:
    """A folder with one image, and all that is called like one and is no file."""
    folder = tmp_path / "specials"
    folder.mkdir()
    noise(9, 9).save(folder / "image.png")
    os.mkfifo(folder / "fifo.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "up").symlink_to("..")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "folder.jpg").mkdir()
    cwd = Path.cwd()
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(folder)  # the path of a socket has to be short
        listening.bind("socket.jpg")
        os.chdir(cwd)
        yield folder


def test_fifos_sockets_and_devices_are_passed_by_in_a_folder_and_are_rows_when_they_are_named(
    shared_bundle: Path, specials: Path
) -> None:
    found = {Path(row["path"]).name: row["reason"] for row in rows_of(run_score(shared_bundle, specials).stdout)}
    assert found == {
        "gone.jpg": "no such file",
        "image.png": "",
        "loop.jpg": "too many levels of symbolic links",
    }
    named = ["fifo.jpg", "socket.jpg", "zero.jpg", "folder.jpg"]
    listed = "".join(f"{specials / name}\n" for name in named).encode()
    rows = rows_of(run_score(shared_bundle, "--list", "-", stdin=listed).stdout)
    assert [row["reason"] for row in rows] == ["not a regular file"] * 3 + ["is a directory"]


def run_score(bundle: Path, *arguments: object, stdin: bytes = b"") -> Run:
    done = run("score", *arguments, "--bundle", bundle, *OPTIONS, stdin=stdin)
    assert done.code == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done


def test_sparse_files_are_rows(shared_bundle: Path, tmp_path: Path) -> None:
    jpeg, png = encoded(noise(9, 9), "JPEG"), encoded(noise(9, 9), "PNG")
    for name, data, size in (
        ("zeros.jpg", b"", 2**40),
        ("zeros.tar", b"", 2**40),
        ("zeros.parquet", b"", 2**40),
        ("jpeg-then-hole.jpg", jpeg, 50 * 2**20),
        ("png-then-hole.png", png, 50 * 2**20),
        ("hole-in-jpeg.jpg", jpeg[:300], len(jpeg)),
    ):
        (tmp_path / name).write_bytes(data)
        os.truncate(tmp_path / name, size)
    listed = b"".join(os.fsencode(path) + b"\0" for path in sorted(tmp_path.iterdir()))
    rows = rows_of(run_score(shared_bundle, "--list", "-", "-0", stdin=listed).stdout)
    assert {Path(row["path"]).name: row["status"] for row in rows} == {
        "hole-in-jpeg.jpg": "unreadable",
        "jpeg-then-hole.jpg": "ok",
        "png-then-hole.png": "ok",
        "zeros.jpg": "unreadable",
        "zeros.parquet": "unreadable",
    }  # zeros are a tar archive's end


def test_a_file_that_grows_while_it_is_read_is_one_row(shared_bundle: Path, tmp_path: Path) -> None:
    file, ended = tmp_path / "growing.jpg", threading.Event()
    whole = encoded(noise(400, 400), "JPEG")
    file.write_bytes(whole)

    def grow() -> None:
        with file.open("ab") as stream:
            while not ended.is_set() and stream.tell() < 2**26:
                stream.write(whole)
                stream.flush()

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        done = run("score", file, "--bundle", shared_bundle, *OPTIONS)
    finally:
        ended.set()
        writer.join()
    (row,) = rows_of(done.stdout)
    assert (done.code, row["status"], row["width"]) == (0, "ok", "400")


def test_members_that_point_outside_are_scored_where_they_are(shared_bundle: Path, tmp_path: Path) -> None:
    png = encoded(noise(9, 9), "PNG")
    archive, outside = tmp_path / "in" / "hostile.tar", tmp_path / "outside.png"
    archive.parent.mkdir()
    names = ["../outside.png", str(outside), "a/../../outside.png", "two\nlines.png", "../outside.png"]
    with tarfile.open(archive, "w") as writer:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(png)
            writer.addfile(member, io.BytesIO(png))
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        writer.addfile(link)
    rows = rows_of(run_score(shared_bundle, archive).stdout)
    assert [row["path"] for row in rows] == [f"{archive}::{name}" for name in [*names, "passwd.png"]]
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["unreadable"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["hostile.tar", "in"]


def test_whatever_is_in_a_list_has_one_row_and_is_not_scored_again(shared_bundle: Path, tmp_path: Path) -> None:
    image = tmp_path / os.fsdecode(b"caf\xe9, \xf0\x9f\x98\x80.png")
    noise(9, 9).save(image)
    names = [os.fsencode(image), b"gone.jpg", b"n" * 2**20, b"m" * 300 + b".tar", b"a\0b.jpg", b"nope://x/y.jpg", b"-"]
    listed = b"\r\n\n".join([*names, os.fsencode(image)])
    output = tmp_path / "scores.csv"
    arguments = ("score", "--list", "-", "--bundle", shared_bundle, *OPTIONS, "-o", output)
    done = run(*arguments, stdin=listed)
    assert done.stderr.startswith("8 images: 2 scored, 6 failed")
    assert [os.fsencode(row["path"]) for row in rows_of(output)] == [*names, os.fsencode(image)]
    whole = output.read_bytes()
    Path(f"{output}.partial").write_bytes(whole[:-1])  # a run that was killed in its last row
    output.unlink()
    assert run(*arguments, "--resume", stdin=listed).code == 1
    assert output.read_bytes() == whole


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_nothing(
    shared_bundle: Path, seeds: list[tuple[Path, Seed]], tmp_path: Path, suffix: str
) -> None:
    fill(tmp_path / "images", seeds[:200])
    whole, output = tmp_path / f"whole.{suffix}", tmp_path / f"scores.{suffix}"
    arguments = ("score", tmp_path / "images", "--bundle", shared_bundle, *OPTIONS, "-o")
    assert run(*arguments, whole).code == 1
    done = run(*arguments, output, limit=5_000)
    assert done.code == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith("; the same command with --resume continues\n")
    assert done.stderr.count("\n") == 1
    assert not output.exists()
    assert run(*arguments, output, "--resume").code == 1
    assert output.read_bytes() == whole.read_bytes()


def test_of_two_runs_on_one_file_the_second_gets_one_line_and_the_first_ends_well(
    shared_bundle: Path, tmp_path: Path
) -> None:
    image, output = tmp_path / "image.png", tmp_path / "scores.csv"
    noise(9, 9).save(image)
    arguments = [
        *("score", "--list", "-", "--bundle", str(shared_bundle), *OPTIONS),
        *("--batch-size", "1", "-o", str(output)),
    ]
    first = subprocess.Popen([sys.executable, "-m", "mdnet_rt.cli.main", *arguments], stdin=subprocess.PIPE)
    assert first.stdin is not None
    first.stdin.write(f"{image}\n".encode() * 8)
    first.stdin.flush()
    partial, deadline = Path(f"{output}.partial"), time.monotonic() + DEADLINE
    while not (partial.exists() and b"image.png" in partial.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for more in ([], ["--resume"]):
        second = run(*arguments, *more, stdin=b"other.png\n")
        assert (second.code, second.stdout) == (2, b"")
        assert second.stderr == (
            f"error: another run is writing to {partial}; wait until it ends, or choose another -o\n"
        )
    first.communicate(f"{image}\n".encode(), timeout=DEADLINE)
    assert first.returncode == 0
    assert [row["path"] for row in rows_of(output)] == [str(image)] * 9
    assert not partial.exists()
