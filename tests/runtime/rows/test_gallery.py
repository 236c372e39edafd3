"""The page of a run: which faces it shows, what it counts, and that it stays small whatever the run."""

from __future__ import annotations

import base64
import csv
import errno
import gc
import io
import os
import random
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, axis, chart, loads_nothing
from PIL import Image

from mdnet_engines.bundle.files import Bundle
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.report.thumbnails import Thumbnail, thumbnail
from mdnet_rt.cli.main import main
from mdnet_rt.rows import gallery
from mdnet_rt.rows.gallery import ENDS, FAILURES_NAMED, MAX_REASONS, MAX_TEXT, SAMPLE, Gallery, check_report
from mdnet_rt.rows.result import Result, Stamp

STAMP = Stamp("tiny fp32", "0123456789ab")
PIXELS = np.zeros((2, 2, 3), np.uint8)


def scored(scores: Iterable[float]) -> list[Result]:
    return [Result(f"{i}.jpg", float(score), pixels=PIXELS) for i, score in enumerate(scores)]


def failed(reasons: Iterable[str]) -> list[Result]:
    return [Result(f"bad{i}.jpg", None, "unreadable", reason) for i, reason in enumerate(reasons)]


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[[Iterable[Result]], str]:
    return lambda rows: written(rows, tmp_path / "out.html")


def written(rows: Iterable[Result], file: Path) -> str:
    page = Gallery()
    for row in rows:
        page.add(row)
    page.write(file, STAMP)
    html = file.read_text(encoding="utf-8")
    loads_nothing(html)
    return html


def pictures(html: str) -> list[tuple[str, float, bytes]]:
    """Name, score and JPEG of each picture, as a screen reader and a browser have them."""
    images = [attributes for tag, attributes in Page(html).elements if tag == "img"]
    found = []
    for image in images:
        name, _, score = str(image["alt"]).rpartition(", score ")
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/jpeg;base64,"))
        found.append((name, float(score.replace("−", "-")), data))
    return found


def bars(html: str) -> list[tuple[int, float, float]]:
    """Count, lower and upper edge of each bar."""
    titles = [str(bar.findtext("title")) for bar in chart(html, "histogram").findall("g[@class='bars']/rect")]
    edges = [title.replace("−", "-").replace(" with a score from ", " to ").split(" to ") for title in titles]
    return [(int(count), float(low), float(high)) for count, low, high in edges]


def test_a_run_gives_a_page_of_its_faces_its_failures_and_its_rows_scores(shared_bundle: Path, tmp_path: Path) -> None:
    colours = {"red": (220, 30, 30), "grey": (128, 128, 128), "white": (250, 250, 250)}
    for name, colour in colours.items():
        Image.new("RGB", (64, 48), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("not an image")
    rows, report = tmp_path / "o.csv", tmp_path / "out.html"
    done = CliRunner().invoke(
        main, ["score", str(tmp_path), "--bundle", str(shared_bundle), "-o", str(rows), "--report", str(report)]
    )
    assert done.exit_code == 1, done.stderr
    expected = {row["path"]: row["score"] for row in csv.DictReader(rows.open()) if row["score"]}
    html = report.read_text(encoding="utf-8")
    loads_nothing(html)
    shown = pictures(html)
    assert {name: f"{score:.4f}" for name, score, _ in shown} == expected
    assert [score for _, score, _ in shown] == sorted((score for _, score, _ in shown), reverse=True)
    for name, _, jpeg in shown:
        with Image.open(io.BytesIO(jpeg)) as picture:
            assert picture.size == (32, 32)
            # JPEG at quality 85 quantises a flat colour to within 2 levels.
            np.testing.assert_allclose(np.asarray(picture)[16, 16], colours[Path(name).stem], atol=3)
    tables = Page(html).tables
    assert tables["failures"][1][:2] == [str(tmp_path / "text.png"), "unreadable"]
    assert tables["reasons"][1] == [tables["failures"][1][2], "unreadable", "1"]
    assert "3 scored, 1 failed" in Page(html).text
    scale = Bundle.open(shared_bundle).manifest.score
    assert f'<th scope="row">rating scale</th><td>{scale}</td>' in html


def test_a_run_that_goes_on_counts_earlier_rows_and_says_that_they_are_not_pictured(
    shared_bundle: Path, photo: Callable[..., Path], tmp_path: Path
) -> None:
    for seed in range(5):
        photo(f"photos/{seed}.png", seed=seed)
    command = ["score", str(tmp_path / "photos"), "--bundle", str(shared_bundle), "-o", str(tmp_path / "o.csv")]
    assert CliRunner().invoke(main, command).exit_code == 0
    lines = (tmp_path / "o.csv").read_bytes().splitlines(keepends=True)
    (tmp_path / "o.csv").unlink()
    (tmp_path / "o.csv.partial").write_bytes(b"".join(lines[:4]))
    done = CliRunner().invoke(main, [*command, "--resume", "--report", str(tmp_path / "out.html")])
    assert done.exit_code == 0, done.stderr
    html = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert sorted(Path(name).name for name, *_ in pictures(html)) == ["3.png", "4.png"]
    assert sum(count for count, *_ in bars(html)) == 5
    assert "3 of the scored images are not pictured" in Page(html).text


@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_highest_and_lowest_are_shown_and_a_sample_of_the_others(
    page_of: Callable[[Iterable[Result]], str], order: str
) -> None:
    scores = [1 + (i // 3) / 256 for i in range(1000)]  # each score thrice, written exactly
    if order == "shuffled":
        random.Random(1).shuffle(scores)
    elif order == "falling":
        scores.reverse()
    html = page_of(scored(scores))
    shown = [score for _, score, _ in pictures(html)]
    names = {name for name, *_ in pictures(html)}
    ordered = sorted((round(score, 5) for score in scores), reverse=True)
    assert len(names) == len(shown) == 2 * ENDS + SAMPLE
    assert shown[:ENDS] == pytest.approx(ordered[:ENDS], abs=1e-5)
    assert shown[-ENDS:] == pytest.approx(ordered[-ENDS:], abs=1e-5)
    assert shown == sorted(shown, reverse=True)
    for name, score, _ in pictures(html):
        assert scores[int(name.removesuffix(".jpg"))] == pytest.approx(score, abs=1e-5)
    assert "A random sample of the other 900" in Page(html).text


@pytest.mark.parametrize("images", [1, ENDS + 1, 2 * ENDS + SAMPLE])
def test_every_image_of_a_small_run_is_shown(page_of: Callable[[Iterable[Result]], str], images: int) -> None:
    html = page_of(scored(range(images)))
    assert [name for name, *_ in pictures(html)] == [f"{i}.jpg" for i in reversed(range(images))]
    assert "All images" in Page(html).text


def test_the_sample_is_as_likely_from_any_part_of_a_run(page_of: Callable[[Iterable[Result]], str]) -> None:
    scores = np.random.default_rng(3).permutation(20_000)
    sample = pictures(page_of(scored(scores)))[ENDS:-ENDS]
    at = np.sort([int(name.removesuffix(".jpg")) for name, *_ in sample]) / len(scores)
    steps = np.arange(SAMPLE + 1) / SAMPLE
    distance = max(np.abs(at - steps[1:]).max(), np.abs(at - steps[:-1]).max())
    assert distance < 1.63 / SAMPLE**0.5  # Kolmogorov-Smirnov, 1 %; the seed is fixed


def test_images_of_equal_score_are_rarely_made_into_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Thumbnail] = []

    def make(pixels: np.ndarray, side: int) -> Thumbnail:
        made.append(thumbnail(pixels, side))
        return made[-1]

    monkeypatch.setattr(gallery, "thumbnail", make)
    page = Gallery()
    for row in scored([3.0] * 5000):
        page.add(row)
    assert len(made) < 1000  # 2 × 50 + 100, and 100 × ln(5000 / 200) more of the sample


def test_pixels_of_a_batch_are_not_held(tmp_path: Path) -> None:
    page = Gallery()
    batch = np.zeros((16, 32, 32, 3), np.uint8)
    held = weakref.ref(batch)
    for i in range(16):
        page.add(Result(f"{i}.jpg", float(i), pixels=batch[i]))
    del batch
    gc.collect()
    assert held() is None
    page.write(tmp_path / "out.html", STAMP)
    assert len(pictures((tmp_path / "out.html").read_text())) == 16


def test_a_picture_is_no_larger_than_it_is_shown(page_of: Callable[[Iterable[Result]], str]) -> None:
    ((_, _, jpeg),) = pictures(page_of([Result("a", 3.0, pixels=np.zeros((256, 512, 3), np.uint8))]))
    assert Image.open(io.BytesIO(jpeg)).size == (128, 64)


def test_reasons_that_differ_in_numbers_are_one(page_of: Callable[[Iterable[Result]], str]) -> None:
    reasons = [f"truncated ({i} bytes, {i}x{i}, at 0x7f{i:08x})" for i in range(100)]
    rows = Page(page_of(failed([*reasons, "not an image (JPEG2000)"]))).tables["reasons"][1:]
    assert rows == [
        ["truncated (# bytes, #x#, at #)", "unreadable", "100"],
        ["not an image (JPEG2000)", "unreadable", "1"],
    ]


def test_ten_thousand_reasons_do_not_fill_the_page(page_of: Callable[[Iterable[Result]], str]) -> None:
    letters = str.maketrans("0123456789", "abcdefghij")
    html = page_of(failed(f"{i:04}".translate(letters) * 1000 for i in range(10_000)))
    rows, names = Page(html).tables["reasons"][1:], Page(html).tables["failures"][1:]
    assert len(rows) == MAX_REASONS + 1
    assert rows[-1] == ["other reasons", "", "9,950"]
    assert [name for name, *_ in names] == [f"bad{i}.jpg" for i in range(FAILURES_NAMED)]
    assert max(len(reason) for *_, reason in names) == MAX_TEXT + 1
    assert "The first 100 of 10,000" in Page(html).text
    assert len(html) < 200_000


def test_a_name_as_long_as_a_book_is_shortened(page_of: Callable[[Iterable[Result]], str]) -> None:
    ((name, *_),) = pictures(page_of([Result("a" * 10**6 + ".jpg", 3.0, pixels=PIXELS)]))
    assert len(name) == MAX_TEXT + 1
    assert name.endswith("a.jpg")


@pytest.mark.parametrize(
    "scores",
    [
        np.random.default_rng(5).uniform(1, 5, 3000),
        np.random.default_rng(5).normal(0, 300, 30_000),  # more thousandths than are counted
        [k / 10 for k in range(10, 51)] * 50,  # every score on an edge
        [-0.25, -0.001, 0.0, 0.001],
    ],
    ids=["uniform", "wide", "round", "around zero"],
)
def test_bars_count_the_scores_between_their_edges(
    page_of: Callable[[Iterable[Result]], str], scores: Iterable[float]
) -> None:
    html = page_of([Result("a", float(score)) for score in scores])
    values = np.asarray(scores) + 1e-9  # a score on an edge counts above it
    for count, low, high in bars(html):
        assert count == ((values >= low) & (values < high)).sum(), (low, high)
    assert sum(count for count, *_ in bars(html)) == len(values)


def test_bars_stand_where_their_scores_are(page_of: Callable[[Iterable[Result]], str]) -> None:
    html = page_of([Result("a", score) for score in [2.0] * 30 + [2.51] * 12 + [4.0] * 5])
    svg = chart(html, "histogram")
    to_x, to_y = axis(svg, "x"), axis(svg, "y")
    rects = [{k: float(v) for k, v in rect.attrib.items()} for rect in svg.findall("g[@class='bars']/rect")]
    for rect, (count, low, high) in zip(rects, bars(html), strict=True):
        assert to_x(rect["x"] + rect["width"] / 2) == pytest.approx((low + high) / 2, abs=0.01)
        assert to_y(rect["y"]) == pytest.approx(count, abs=0.1)


def test_a_million_images_keep_a_readable_axis(page_of: Callable[[Iterable[Result]], str]) -> None:
    one = Result("a", 3.0)
    page = Page(page_of(one for _ in range(1_000_000)))
    assert "images (×10⁶)" in page.text
    assert "Scores of 1,000,000 images" in page.text


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.text(), st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=6),
    st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=4),
)
def test_any_names_and_scores_give_a_page(
    tmp_path_factory: pytest.TempPathFactory,
    good: list[tuple[str, float]],
    bad: list[tuple[str, str, str]],
) -> None:
    rows = [Result(name, score, pixels=PIXELS) for name, score in good]
    rows += [Result(name, None, status, reason) for name, status, reason in bad]
    html = written(rows, tmp_path_factory.getbasetemp() / "any.html")
    assert len(pictures(html)) == len(good)
    assert "nan" not in "".join(re.findall(r' (?:x|y|width|height)="([^"]*)"', html))
    if good:
        labels = [str(text.text) for text in chart(html, "histogram").findall("text")]
        assert max(map(len, labels)) < 20
        assert sum(int(title.split()[0]) for title in re.findall(r"<title>(\d+ with [^<]*)", html)) == len(good)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>.jpg", "<script>alert(1)</script>.jpg"),
        ('"><svg onload="x">.jpg', '"><svg onload="x">.jpg'),
        ("' onerror='x", "' onerror='x"),
        ("{{ 7*7 }}{% raw %}", "{{ 7*7 }}{% raw %}"),
        (b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), r"caf\udce9.jpg"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("two\nlines\x1b[31m.jpg", r"two\nlines\x1b[31m.jpg"),
        ("脸-é.jpg", "脸-é.jpg"),
    ],
)
def test_hostile_text_is_shown_and_changes_nothing(
    page_of: Callable[[Iterable[Result]], str], name: str, shown: str
) -> None:
    def rows(text: str) -> list[Result]:
        return [Result(f"a/{text}", 3.0, pixels=PIXELS), Result(text, None, text, text)]

    plain, page = Page(page_of(rows("x"))), Page(page_of(rows(name)))
    assert [(tag, sorted(attributes)) for tag, attributes in page.elements] == [
        (tag, sorted(attributes)) for tag, attributes in plain.elements
    ]
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == [f"a/{shown}, score 3.00000"]
    assert page.tables["failures"][1] == [shown] * 3
    assert page.text.count(shown) >= 4  # under its picture, and in the row of its failure


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["/data/faces/ab/1.jpg", "/data/faces/ac/2.jpg"], "/data/faces/"),
        (["faces/1.jpg"], "faces/"),
        (["a/b/c.jpg", "a/b.jpg"], "a/"),
        (["a/1.jpg", "b/1.jpg"], ""),
        (["1.jpg", "2.jpg"], ""),
        (["b/x.tar::1.jpg", "b/x.tar::2.jpg"], "b/"),
    ],
)
def test_a_folder_that_all_names_share_is_told_once(
    page_of: Callable[[Iterable[Result]], str], names: list[str], folder: str
) -> None:
    html = page_of([Result(name, 3.0, pixels=PIXELS) for name in names])
    assert re.findall('<bdi class="name">(.*?)</bdi>', html) == ([folder] if folder else [])
    assert re.findall('<bdi class="of">(.*?)</bdi>', html) == [name.removeprefix(folder) for name in names]
    assert [name for name, *_ in pictures(html)] == names


@pytest.mark.parametrize("rows", [[], failed(["no such file"] * 3)], ids=["nothing", "all failed"])
def test_without_a_score_the_page_says_so(page_of: Callable[[Iterable[Result]], str], rows: list[Result]) -> None:
    page = Page(page_of(rows))
    assert f"0 scored, {len(rows)} failed" in page.text
    assert "nothing to draw" in page.text
    assert "svg" not in page.tags()
    assert ("failures" in page.tables) == bool(rows)


def test_the_same_run_gives_the_same_page(page_of: Callable[[Iterable[Result]], str]) -> None:
    scores = np.random.default_rng(2).normal(3, 1, 500)
    assert page_of(scored(scores)) == page_of(scored(scores))


def test_tables_and_chart_are_described_for_screen_readers(page_of: Callable[[Iterable[Result]], str]) -> None:
    html = page_of([*scored([1, 2, 3]), *failed(["empty file"])])
    page = Page(html)
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert page.tags().count("caption") == page.tags().count("table") == 3
    svg = chart(html, "histogram")
    ids = {element.get("id"): element.text for element in svg if element.tag in ("title", "desc")}
    assert all(ids[label] for label in svg.attrib["aria-labelledby"].split())


def test_a_full_disk_is_one_line_and_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "out.html"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MDNetError, match=r"out\.html was not written: No space left on device; the rows are complete$"):
        Gallery().write(file, STAMP)
    assert os.listdir(tmp_path) == ["out.html"]
    assert file.read_text() == "old"


def test_a_link_is_followed_and_the_longest_name_is_written(tmp_path: Path) -> None:
    target = tmp_path / ("a" * 250 + ".html")
    (tmp_path / "link.html").symlink_to(target)
    check_report(tmp_path / "link.html")
    Gallery().write(tmp_path / "link.html", STAMP)
    assert (tmp_path / "link.html").is_symlink()
    assert target.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("deadline", "fifo")
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("no/out.html", "does not exist; create it"),
        ("bundles", "is a folder"),
        ("pipe.jpg", "is not a regular file"),
        ("locked/out.html", "no permission to write to"),
        ("read-only.html", "no permission to write to"),
    ],
)
def test_a_page_that_could_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_bundle: Path, output: str, message: str
) -> None:
    for folder in ("bundles", "locked"):
        (tmp_path / folder).mkdir()
    (tmp_path / "read-only.html").touch()
    (tmp_path / "a.jpg").touch()
    closed = {tmp_path / "locked", tmp_path / "read-only.html"}
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed)  # to root everything is open
    with pytest.raises(UsageError, match=message):
        check_report(tmp_path / output)
    command = ["score", str(tmp_path / "a.jpg"), "--bundle", str(shared_bundle), "--report", str(tmp_path / output)]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_page_does_not_take_the_place_of_an_open_file(tmp_path: Path) -> None:
    with (tmp_path / "log").open("ab") as stream, pytest.raises(UsageError, match="is not a regular file"):
        check_report(Path(f"/dev/fd/{stream.fileno()}"))


def test_without_jinja2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MDNetError, match=r"mdnet\[report\]"):
        check_report(tmp_path / "out.html")
