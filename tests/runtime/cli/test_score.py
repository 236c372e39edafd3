"""`mdnet-rt score`: rows on stdout, one line on stderr, and an exit code that says what happened."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.bundle.manifest import MANIFEST_NAME
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_rt.cli.main import main
from mdnet_rt.images.preprocess import load_image

Photo = Callable[..., Path]
PORTRAIT = Path(__file__).parents[2] / "data" / "portrait.jpg"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


@pytest.fixture
def photos(photo: Photo, tmp_path: Path) -> Path:
    """Three good images and two bad ones."""
    for seed in range(3):
        photo(f"photos/img{seed}.png", seed=seed)
    (tmp_path / "photos" / "text.jpg").write_text("not an image")
    (tmp_path / "photos" / "zero.jpg").touch()
    return tmp_path / "photos"


def test_the_bundles_framing_is_used_and_another_has_a_line_of_warning(
    face_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    usual = run("score", PORTRAIT, photos / "img0.png", "--bundle", face_bundle)
    assert "warning" not in usual.stderr
    assert [row[2] for row in rows(usual.stdout)[1:]] == ["ok", "no_face"]
    wider = run("score", PORTRAIT, "--bundle", face_bundle, "--face", "crop:2")
    (line,) = [line for line in wider.stderr.splitlines() if line.startswith("warning: ")]
    assert "a square of 1.2 times the face, and gets a square of 2 times the face" in line
    assert rows(wider.stdout)[1][1] != rows(usual.stdout)[1][1]
    assert rows(wider.stdout)[1][-1] != rows(usual.stdout)[1][-1]  # the digest, so that rows are not mixed
    refused = run("score", PORTRAIT, "--bundle", face_bundle, "--face", "wide")
    assert (refused.exit_code, "none, crop or crop:FACTOR" in refused.stderr) == (2, True)


def test_a_pipe_gets_csv_with_every_image_and_the_exit_code_tells_of_failures(
    shared_bundle: Path, photos: Path, expected_score: Callable[[np.ndarray], float]
) -> None:
    result = run("score", photos, "--bundle", shared_bundle)
    assert result.exit_code == 1
    header, *body = rows(result.stdout)
    assert header == ["path", "score", "status", "reason", "width", "height", "model", "bundle"]
    for seed, row in enumerate(body[:3]):
        file = photos / f"img{seed}.png"
        stamp = ["tiny fp32", Bundle.open(shared_bundle).manifest.digest()[:12]]
        assert row == [str(file), f"{expected_score(load_image(file, 32)):.4f}", "ok", "", "40", "48", *stamp]
    assert [row[:2] for row in body[3:]] == [[str(photos / "text.jpg"), ""], [str(photos / "zero.jpg"), ""]]
    assert body[4][2:6] == ["unreadable", "empty file", "", ""]
    assert result.stderr.startswith("5 images: 3 scored, 2 failed, ")
    assert result.stderr.count("\n") == 1


def test_all_good_is_exit_code_0(shared_bundle: Path, photo: Photo) -> None:
    result = run("score", photo("a.jpg"), photo("b.webp"), "--bundle", shared_bundle, "--format", "jsonl")
    assert result.exit_code == 0
    assert all(json.loads(line)["reason"] is None for line in result.stdout.splitlines())


@pytest.mark.usefixtures("deadline")
def test_bad_files_of_every_kind_are_rows(
    shared_bundle: Path, photo: Photo, tmp_path: Path, fifo: Path, png_declaring: Callable[[int, int], bytes]
) -> None:
    whole = photo("whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bomb.png").write_bytes(png_declaring(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(png_declaring(10_000, 9_000))
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / "float.tif").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    bad = {
        "cut.png": "truncated",
        "bomb.png": "60000x60000 pixels exceed",
        "large.png": "10000x9000 pixels exceed",
        "gone.png": "no such file",
        "float.tif": "floating-point",
        fifo.name: "not a regular file",
    }
    result = run("score", *[tmp_path / name for name in bad], tmp_path / "whole.png", "--bundle", shared_bundle)
    assert result.exit_code == 1
    body = rows(result.stdout)[1:]
    for row, reason in zip(body, bad.values(), strict=False):
        assert row[3].startswith(reason)
    assert body[-1][1]
    assert result.stderr.count("\n") == 1  # no warning of Pillow's among it


def test_odd_but_good_images_are_scored(shared_bundle: Path, photo: Photo, tmp_path: Path) -> None:
    odd = [photo("tiny.png", shape=(1, 1)), photo("tall.png", shape=(20000, 1)), photo("plain.gif")]
    (tmp_path / "jpeg-inside.png").write_bytes(photo("a.jpg").read_bytes())
    result = run("score", *odd, tmp_path / "jpeg-inside.png", "--bundle", shared_bundle)
    assert result.exit_code == 0, result.stdout


def test_a_name_that_is_not_utf8_reaches_stdout_as_its_bytes(shared_bundle: Path, photo: Photo) -> None:
    file = photo(os.fsdecode(b"caf\xe9.png"))
    result = run("score", file.parent, "--bundle", shared_bundle)
    assert b"/caf\xe9.png," in result.stdout_bytes
    table = run("score", file, "--bundle", shared_bundle, "--format", "table")
    assert rb"/caf\xe9.png" in table.stdout_bytes


def test_output_goes_to_the_file_by_its_suffix(shared_bundle: Path, photos: Path, tmp_path: Path) -> None:
    for name in ("scores.csv", "scores.jsonl", "scores.parquet"):
        result = run("score", photos, "--bundle", shared_bundle, "-o", tmp_path / name)
        assert result.stdout == ""
        assert result.exit_code == 1
    assert len(rows((tmp_path / "scores.csv").read_text())) == 6
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 5
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.to_pylist() == [pytest.approx(json.loads(line)) for line in lines]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["score"], "give images, folders"),
        (["score", "photos", "--list", "-"], "one of the two"),
        (["score", "photos", "--null"], "--null requires --list"),
        (["score", "--list", "nowhere.txt"], "nowhere.txt: no such file"),
        (["score", "photos", "--resume"], "name it with -o"),
        (["score", "photos", "--format", "parquet"], "needs a file"),
        (["score", "photos", "--format", "table", "-o", "t.txt", "--resume"], "a table can't be continued"),
        (["score", "photos", "-o", "s3://bucket/a.csv"], "is a URL"),
        (["score", "nowhere"], "nowhere does not exist"),
        (["score", "empty"], "no images in empty"),
        (["score", "x*.jpg"], "no file matches"),
        (["score", "photos", "-o", "scores.txt"], ".csv, .jsonl or .parquet"),
        (["score", "photos", "-o", "missing/scores.csv"], "does not exist; create it"),
        (["score", "photos", "--batch-size", "0"], "0 is not in the range"),
        (["score", "photos", "--backend", "abacus"], "abacus"),
        (["score", "photos"], "no bundle"),
        (["scoer", "photos"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.usefixtures("photos")
def test_bad_usage_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MDNET_BUNDLE", raising=False)
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def _wrong_hash(bundle: Path) -> None:
    file = bundle / "vim.onnx"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _cut(bundle: Path) -> None:
    (bundle / "vim.onnx").write_bytes((bundle / "vim.onnx").read_bytes()[:-1])


def _edit(**changes: object) -> Callable[[Path], None]:
    def edit(bundle: Path) -> None:
        manifest = json.loads((bundle / MANIFEST_NAME).read_text())
        (bundle / MANIFEST_NAME).write_text(json.dumps(manifest | changes))

    return edit


def _outside(bundle: Path) -> None:
    shutil.copy(bundle / "vim.onnx", bundle.parent / "vim.onnx")
    text = (bundle / MANIFEST_NAME).read_text()
    (bundle / MANIFEST_NAME).write_text(text.replace('"vim.onnx"', '"../vim.onnx"'))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_wrong_hash, "it was altered"),
        (_cut, "the copy is incomplete or altered"),
        (_outside, "graphs.vim.file.name"),
        (_edit(schema_version=99), "schema version 99"),
        (_edit(surprise=1), "surprise"),
        (_edit(graphs={}), "lacks the graphs"),
        (lambda bundle: (bundle / "fusion.onnx").unlink(), "fusion.onnx is missing"),
        (lambda bundle: (bundle / MANIFEST_NAME).unlink(), "is not a bundle"),
        (lambda bundle: (bundle / MANIFEST_NAME).write_text("{"), "is not JSON"),
        (shutil.rmtree, "no such folder"),
    ],
    ids=[
        "hash",
        "cut",
        "outside",
        "schema",
        "unknown-field",
        "no-graphs",
        "missing",
        "no-manifest",
        "json",
        "gone",
    ],
)
def test_a_bundle_that_cannot_be_trusted_is_exit_code_1(
    bundle: Path, photos: Path, tmp_path: Path, tamper: Callable[[Path], None], message: str
) -> None:
    tamper(bundle)
    result = run("score", photos, "--bundle", bundle, "-o", tmp_path / "scores.csv")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not list(tmp_path.glob("scores.csv*"))


@pytest.mark.parametrize(
    ("weights", "note"), [("demo", "demo weights"), ("random", "random weights"), ("checkpoint", "")]
)
def test_scores_without_meaning_come_with_a_note(
    make_bundle: Callable[..., Path], photo: Photo, tmp_path: Path, weights: str, note: str
) -> None:
    result = run("score", photo("a.png"), "--bundle", make_bundle(tmp_path / "b", weights=weights))
    lines = result.stderr.splitlines()
    assert result.exit_code == 0
    assert (note in lines[0] and len(lines) == 2) if note else len(lines) == 1
    assert len(rows(result.stdout)) == 2


def run_closed(closed: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run `mdnet-rt score` with a standard stream that the shell has closed."""
    command = shlex.join([sys.executable, "-m", "mdnet_rt", "score", *map(str, args)])
    return subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_that_is_not_needed_changes_nothing(
    shared_bundle: Path, photos: Path, tmp_path: Path, closed: str
) -> None:
    output = tmp_path / "scores.csv"
    done = run_closed(closed, photos, "--bundle", shared_bundle, "-o", output)
    assert done.returncode == 1  # two of the images are bad
    assert output.read_text() == run("score", photos, "--bundle", shared_bundle).stdout
    assert done.stdout == ""
    assert done.stderr.startswith("5 images: 3 scored, 2 failed") or "2>&-" in closed


def test_rows_are_written_where_standard_error_is_closed(shared_bundle: Path, photos: Path) -> None:
    done = run_closed("2>&-", photos / "img0.png", "--bundle", shared_bundle)
    assert (done.returncode, done.stdout) == (0, run("score", photos / "img0.png", "--bundle", shared_bundle).stdout)


@pytest.mark.parametrize(
    ("closed", "args", "message"),
    [
        (">&-", ["img0.png"], "rows go to standard output, which is closed; name a file with -o"),
        (">&-", ["img0.png", "--format", "csv", "-o", "/dev/stdout"], "-o /dev/stdout is not open for writing"),
        ("<&-", ["--list", "-"], "--list - reads standard input, which is closed"),
    ],
)
def test_a_closed_stream_that_is_needed_is_one_line(
    shared_bundle: Path, photos: Path, closed: str, args: list[str], message: str
) -> None:
    args = [str(photos / arg) if arg == "img0.png" else arg for arg in args]
    done = run_closed(closed, *args, "--bundle", shared_bundle)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


SUFFIX_FORMATS = {
    "AVIF": [".avif"],
    "BMP": [".bmp"],
    "GIF": [".gif"],
    "JPEG": [".jpg", ".JPG", ".jpeg", ".jpe", ".jfif"],
    "JPEG2000": [".jp2"],
    "PNG": [".png"],
    "PPM": [".ppm", ".pnm"],
    "TIFF": [".tif", ".tiff"],
    "WEBP": [".webp"],
}


@pytest.mark.parametrize("place", ["folder", "archive"])
def test_an_image_of_any_suffix_is_found_in_a_folder_and_an_archive(
    shared_bundle: Path, tmp_path: Path, place: str
) -> None:
    folder, image = tmp_path / "in", Image.effect_noise((40, 40), 50).convert("RGB")
    folder.mkdir()
    for format, suffixes in SUFFIX_FORMATS.items():
        for suffix in suffixes:
            image.save(folder / f"image{suffix}", format)
    for name in ("drawing.svg", "icon.ico", "raw.nef", "photo.jxl"):
        (folder / name).write_bytes(b"of a format that is not decoded")
    for name in ("notes.txt", "scores.csv", "Thumbs.db", "clip.mp4"):
        (folder / name).write_bytes(b"no image")
    location = folder
    if place == "archive":
        location = tmp_path / "in.tar"
        with tarfile.open(location, "w") as archive:
            for file in folder.iterdir():
                archive.add(file, file.name)
    result = run("score", location, "--bundle", shared_bundle, "--format", "jsonl")
    statuses = {re.split("::|/", row["path"])[-1]: row["status"] for row in map(json.loads, result.stdout.splitlines())}
    good = {f"image{suffix}": "ok" for suffixes in SUFFIX_FORMATS.values() for suffix in suffixes}
    assert statuses == good | dict.fromkeys(("drawing.svg", "icon.ico", "raw.nef", "photo.jxl"), "unreadable")
    assert result.exit_code == 1


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("into", ["a file that is appended to", "a pipe"])
def test_rows_for_standard_output_by_name_come_there_and_nothing_is_lost(
    shared_bundle: Path, photos: Path, tmp_path: Path, name: str, into: str
) -> None:
    command = [
        sys.executable,
        "-m",
        "mdnet_rt.cli.main",
        "score",
        str(photos / "img0.png"),
        "--bundle",
        str(shared_bundle),
    ]
    log = tmp_path / "log"
    log.write_bytes(b"earlier\n")
    with log.open("ab") as stream:
        out = subprocess.PIPE if into == "a pipe" else stream
        done = subprocess.run([*command, "-o", name, "--format", "csv"], stdout=out, check=True)
    found = done.stdout if into == "a pipe" else log.read_bytes().removeprefix(b"earlier\n")
    assert found.decode() == run(*command[3:]).stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's always full device")
def test_a_full_disk_is_one_line_and_exit_code_1(shared_bundle: Path, photos: Path) -> None:
    result = run("score", photos, "--bundle", shared_bundle, "-o", "/dev/full", "--format", "csv")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no space left on the disk")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("failure", "code", "start"),
    [
        (KeyboardInterrupt(), 130, "error: interrupted; the 2 rows so far are in "),
        (OSError(28, "No space left on device"), 1, "error: no space left on the disk"),
    ],
)
def test_a_run_that_ends_early_says_where_its_rows_are(
    shared_bundle: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    code: int,
    start: str,
) -> None:
    graph_run = OrtSession.run
    runs = []

    def fail_in_the_second_batch(self: OrtSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        runs.append(1)
        if len(runs) > 3:  # three graphs a batch
            raise failure
        return graph_run(self, feeds)

    monkeypatch.setattr(OrtSession, "run", fail_in_the_second_batch)
    output = tmp_path / "scores.csv"
    one_kind = ("--backend", "onnxruntime-cpu")
    result = run("score", photos, "--bundle", shared_bundle, "-o", output, "--batch-size", 2, *one_kind)
    assert result.exit_code == code
    assert result.stderr.startswith(start)
    assert result.stderr.endswith(
        f"the 2 rows so far are in {output}.partial; the same command with --resume continues\n"
    )
    assert not output.exists()
    assert len(rows(Path(f"{output}.partial").read_text())) == 3


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "mdnet_rt.cli.main", *map(str, args)]


def test_a_terminal_gets_a_table_and_a_bar_that_goes_away(shared_bundle: Path, photos: Path) -> None:
    main_end, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(
        command("score", photos, "--bundle", shared_bundle), stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(main_end, 4096):
            shown += chunk
    except OSError:  # how Linux reports that the other end of a terminal has closed
        pass
    os.close(main_end)
    assert process.wait(timeout=60) == 1
    last_bar = shown.rindex(b"\x1b[2K")  # the line it was on is erased
    assert b"img2.png" in shown[last_bar:]
    assert b"problem" in shown[last_bar:]
    assert b"empty file" in shown[last_bar:]
    assert b"5 images: 3 scored, 2 failed" in shown[last_bar:]


def test_a_reader_that_goes_away_ends_the_run_quietly(shared_bundle: Path, photo: Photo) -> None:
    process = subprocess.Popen(
        command("score", *[photo(f"{seed}.png") for seed in range(4)], "--bundle", shared_bundle, "--batch-size", 1),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    stderr = process.stderr.read()
    process.wait(timeout=60)
    assert stderr == b""


def slowed(photos: list[Path], bundle: Path, output: Path) -> str:
    """A program that scores one image at a time, and waits in the graphs for the file `go` after the first.

    The file `inside` appears when it waits there. The folder `signals` has a file for each signal that it has taken
    notice of.
    """
    go, names = output.parent / "go", " ".join(f"{str(photo)!r}," for photo in photos)
    signals = output.parent / "signals"
    signals.mkdir()
    return f"""
import pathlib, signal, time
install = signal.signal
def install_noted(number, handler):
    def noted(*arguments):
        try:
            handler(*arguments)
        finally:
            pathlib.Path({str(signals)!r}, str(time.monotonic_ns())).touch()
    return install(number, noted if callable(handler) else handler)
signal.signal = install_noted
from mdnet_engines.sessions.onnxruntime import OrtSession
run, runs = OrtSession.run, []
def slow(self, feeds):
    runs.append(1)
    if len(runs) > 3:
        pathlib.Path({str(output.parent / "inside")!r}).touch()
    while len(runs) > 3 and not pathlib.Path({str(go)!r}).exists():
        time.sleep(0.01)
    return run(self, feeds)
OrtSession.run = slow
from mdnet_rt.cli.main import main
main(["score", {names} "--bundle", {str(bundle)!r}, "-o", {str(output)!r}, "--batch-size", "1",
      "--backend", "onnxruntime-cpu"])
"""


def wait_for_the_first_row(process: subprocess.Popen[str], partial: Path) -> None:
    """And until the second image is in the graphs."""
    inside = partial.parent / "inside"
    while process.poll() is None and not (inside.exists() and len(partial.read_text().splitlines()) == 2):
        time.sleep(0.01)


def send(process: subprocess.Popen[str], number: signal.Signals, noted: Path) -> None:
    """Send a signal and wait until it has been handled."""
    before = len(list(noted.iterdir()))
    process.send_signal(number)
    while process.poll() is None and len(list(noted.iterdir())) == before:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_batch_in_the_graphs_finish_and_says_how_to_go_on(
    shared_bundle: Path, photo: Photo, tmp_path: Path, number: signal.Signals
) -> None:
    output, photos = tmp_path / "scores.csv", [photo(f"{seed}.png") for seed in range(6)]
    process = subprocess.Popen(
        [sys.executable, "-c", slowed(photos, shared_bundle, output)], stderr=subprocess.PIPE, text=True
    )
    partial = Path(f"{output}.partial")
    wait_for_the_first_row(process, partial)
    send(process, number, tmp_path / "signals")
    (tmp_path / "go").touch()
    message = f"error: interrupted; the 2 rows so far are in {partial}; the same command with --resume continues"
    assert process.stderr.read().strip() == message
    assert process.wait(timeout=60) == 130


def test_a_second_ctrl_c_does_not_wait(shared_bundle: Path, photo: Photo, tmp_path: Path) -> None:
    output, photos = tmp_path / "scores.csv", [photo(f"{seed}.png") for seed in range(3)]
    process = subprocess.Popen(
        [sys.executable, "-c", slowed(photos, shared_bundle, output)], stderr=subprocess.PIPE, text=True
    )
    wait_for_the_first_row(process, Path(f"{output}.partial"))
    send(process, signal.SIGINT, tmp_path / "signals")
    send(process, signal.SIGINT, tmp_path / "signals")
    (tmp_path / "go").touch()  # what is in the graphs can't be left
    assert "the 1 row so far is in" in process.stderr.read()
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_run_that_was_killed_is_resumed_and_loses_or_repeats_nothing(
    shared_bundle: Path, photo: Photo, tmp_path: Path, suffix: str
) -> None:
    photos = [photo(f"{seed}.png", seed=seed) for seed in range(12)]
    whole, output = tmp_path / f"whole.{suffix}", tmp_path / f"scores.{suffix}"
    arguments = ["score", *photos, "--bundle", shared_bundle, "--backend", "onnxruntime-cpu", "-o"]
    assert run(*arguments, whole).exit_code == 0
    process = subprocess.Popen([sys.executable, "-c", slowed(photos, shared_bundle, output)])
    partial = Path(f"{output}.partial")
    rows_at_first = 2 if suffix == "csv" else 1
    while process.poll() is None and not (partial.exists() and len(partial.read_bytes().splitlines()) == rows_at_first):
        time.sleep(0.01)
    process.kill()
    process.wait()
    partial.write_bytes(partial.read_bytes() + b'"cut in the mi')
    assert "add --resume" in run(*arguments, output).stderr
    resumed = run(*arguments, output, "--resume")
    assert resumed.exit_code == 0
    assert resumed.stderr.startswith("12 images: 12 scored")
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    assert "already complete" in run(*arguments, output, "--resume").stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("mdnet-rt, version ")
    shown = run("score", "--help")
    assert shown.exit_code == 0
    for option in ("--bundle", "--output", "--format", "--batch-size", "--threads", "--backend"):
        assert option in shown.stdout
