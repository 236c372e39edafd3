"""The evaluation's page: the benchmark's figures, published ones beside them, charts to measure, nothing loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pages import Page, axis, chart, dots, loads_nothing

from mdnet.cli.main import main
from mdnet.data.rated import Rated, Scale
from mdnet.data.scut_fbp5500 import GROUPS, Protocol
from mdnet.evaluation.protocols import Benchmark, SplitResult
from mdnet.evaluation.published import PUBLISHED
from mdnet.evaluation.report_page import render_report
from mdnet.evaluation.scored_model import ScoredModel
from mdnet.model.checkpoint import demo_checkpoint
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.report.charts import MAX_POINTS


def benchmark(
    protocol: Protocol = "cv5", images: int = 40, notes: list[str] | None = None, data: str = "d"
) -> Benchmark:
    rng = np.random.default_rng(4)
    model = ScoredModel(Path("model.safetensors"), "checkpoint", 128, Training(), {"preset": "demo"}, scale=Scale(1, 5))
    names = ["60-40"] if protocol == "60-40" else [f"fold {n}" for n in range(1, 6)]
    splits = []
    for row, name in enumerate(names):
        groups = [GROUPS[i % 4] for i in range(images)]
        files = [Path(f"{group}{1 + i + row * images}.jpg") for i, group in enumerate(groups)]
        ratings = rng.uniform(1, 5, images).astype(np.float32)
        test = Rated(files, ratings, groups)
        splits.append(SplitResult(name, model, test, ratings + rng.normal(0, 0.3, images)))
    return Benchmark(protocol, data, splits, notes or [])


def table(page: Page, name: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.tables[name][1:]}


def test_page_loads_nothing_and_runs_nothing() -> None:
    loads_nothing(render_report(benchmark(), facts={"command": "mdnet evaluate"}))


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_tables_hold_the_figures_of_every_split_and_group(protocol: Protocol) -> None:
    result = benchmark(protocol)
    page = Page(render_report(result, facts={}))
    splits = table(page, "splits")
    for split in result.splits:
        found = split.evaluation()
        assert splits[split.name] == ["40", f"{found.pearson:.4f}", f"{found.mae:.4f}", f"{found.rmse:.4f}"]
    groups = table(page, "groups")
    assert list(groups) == list(GROUPS)
    for group in GROUPS:
        spread = result.spread(group)
        mean = f"{spread.mean['pearson']:.4f}"
        shown = mean if protocol == "60-40" else f"{mean} ± {spread.sd['pearson']:.4f}"
        assert groups[group][:2] == [str(spread.images), shown]


def test_the_mean_over_folds_leads_the_page() -> None:
    result = benchmark()
    spread = result.spread()
    page = Page(render_report(result, facts={}))
    headline = f"{spread.mean['pearson']:.4f} ± {spread.sd['pearson']:.4f}"
    assert f"PC {headline}" in page.text[: page.text.index("What was measured")]
    assert table(page, "splits")["mean ± sd"][1] == headline
    for number, split in enumerate(result.splits, start=1):
        assert table(page, f"groups-{number}")["CM"][2] == f"{split.evaluation('CM').mae:.4f}"


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_published_results_are_beside_ours_with_protocol_and_source(protocol: Protocol) -> None:
    result = benchmark(protocol)
    rows = Page(render_report(result, facts={})).tables["published"][1:]
    assert rows[0][:3] == ["this run", protocol, f"{result.spread().mean['pearson']:.4f}"]
    assert len(rows) == 1 + len(PUBLISHED)
    assert {row[1] for row in rows[1:4]} == {protocol}
    assert all(row[1] in ("60-40", "cv5", "not stated") and row[5] for row in rows[1:])
    resnext = {"60-40": ["0.8777", "0.2518", "0.3325"], "cv5": ["0.8997", "0.2291", "0.3017"]}[protocol]
    assert ["ResNeXt-50", protocol, *resnext] in [row[:5] for row in rows]
    assert ["MD-Net (SynergyNet)", "not stated", "0.9235", "–", "–"] in [row[:5] for row in rows]


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_charts_show_every_image_at_its_rating(protocol: Protocol) -> None:
    result = benchmark(protocol)
    html = render_report(result, facts={})
    truth = np.concatenate([split.test.ratings for split in result.splits])
    scores = np.concatenate([split.scores for split in result.splits])
    for name, ys in (("scatter", scores), ("residuals", scores - truth)):
        svg = chart(html, name)
        to_x, to_y = axis(svg, "x"), axis(svg, "y")
        read = [(to_x(x), to_y(y)) for x, y in dots(svg)]
        # Positions are written to 0.01 units of 368 that span at most 8 rating points: 1e-4 each way, some for the fit.
        np.testing.assert_allclose(read, np.column_stack([truth, ys]), atol=5e-4)
        assert len(svg.findall("g[@class='rings']/circle")) == 10
    bars = chart(html, "histogram").findall("g[@class='bars']/rect/title")
    assert sum(int(str(bar.text).split()[0]) for bar in bars) == len(truth)


def test_the_zero_line_of_residuals_is_at_zero() -> None:
    svg = chart(render_report(benchmark(), facts={}), "residuals")
    line = next(element.attrib for element in svg.findall("line") if element.get("class") == "identity")
    assert axis(svg, "y")(float(line["y1"])) == pytest.approx(0, abs=5e-4)
    assert line["y1"] == line["y2"]


def test_largest_errors_come_first() -> None:
    result = benchmark("60-40")
    (split,) = result.splits
    error = split.scores - split.test.ratings
    order = np.argsort(-np.abs(error))[:10]
    rows = Page(render_report(result, facts={})).tables["worst"][1:]
    assert [row[0] for row in rows] == [split.test.images[row].name for row in order]
    assert float(rows[0][3].replace("−", "-")) == pytest.approx(error[order[0]], rel=5e-3)  # three digits


def test_notes_and_names_are_shown_as_text() -> None:
    result = benchmark(notes=["<script>alert(1)</script> has seen test images"], data="</title><b>faces")
    page = Page(render_report(result, facts={"command": "<i>"}))
    assert "<script>alert(1)</script> has seen test images" in page.text
    assert not {"script", "i"} & set(page.tags())
    assert "\\udcff" in Page(render_report(benchmark(data="caf\udcff"), facts={})).text


def test_a_whole_data_set_gives_a_small_page() -> None:
    html = render_report(benchmark(images=1100), facts={})
    assert len(dots(chart(html, "scatter"))) == MAX_POINTS
    assert f"Drawn are {MAX_POINTS} of 5500 images" in " ".join(Page(html).text.split())
    assert len(html) < 500_000


@pytest.mark.parametrize("scores", [np.full(4, 3.0), np.array([2.0, 3.0, 4.0, 5.0])])
@pytest.mark.parametrize("ratings", [np.full(4, 3.0), np.array([2.0, 3.0, 4.0, 5.0])])
def test_equal_scores_or_ratings_still_make_a_page(scores: np.ndarray, ratings: np.ndarray) -> None:
    model = ScoredModel(Path("m"), "bundle", 128, Training(), scale=Scale(1, 5))
    test = Rated([Path(f"{group}1.jpg") for group in GROUPS], ratings.astype(np.float32), [*GROUPS])
    html = render_report(Benchmark("60-40", "d", [SplitResult("60-40", model, test, scores)], []), facts={})
    for name in ("scatter", "residuals", "histogram"):
        chart(html, name)
    assert table(Page(html), "groups")["AF"][1] == "–"  # no correlation of one image


def test_a_tables_page_has_its_scale_and_groups_and_no_published_results() -> None:
    model = ScoredModel(Path("m"), "bundle", 128, Training(), scale=Scale(1, 10))
    ratings = np.linspace(1, 10, 6).astype(np.float32)
    test = Rated([Path(f"{row}.jpg") for row in range(6)], ratings, ["old", "young", "old", "", "young", "<b>"])
    html = render_report(Benchmark("split", "r.csv", [SplitResult("val", model, test, ratings + 0.5)], []), facts={})
    page = Page(html)
    assert list(table(page, "groups")) == ["<b>", "old", "young"]
    assert "published" not in page.tables
    assert "in rating points (1 to 10)" in " ".join(page.text.split())
    assert "Groups as the table of ratings has them" in page.text
    loads_nothing(html)


def test_a_table_without_groups_has_no_table_of_groups() -> None:
    model = ScoredModel(Path("m"), "bundle", 128, Training(), scale=Scale(0, 1))
    test = Rated([Path("a.jpg"), Path("b.jpg")], np.array([0, 1], np.float32))
    page = Page(render_report(Benchmark("all", "r.csv", [SplitResult("all", model, test, np.ones(2))], []), facts={}))
    assert "groups" not in page.tables


def test_the_command_writes_the_page(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["evaluate", str(demo_checkpoint()), "--data", str(faces), "--report", str(file)])
    assert done.exit_code == 0, done.stderr
    html = file.read_text(encoding="utf-8")
    loads_nothing(html)
    shown = table(Page(html), "splits")["60-40"]
    assert done.stdout.startswith(f"60-40: PC {shown[1]}  MAE {shown[2]}  RMSE {shown[3]} on {shown[0]} test images; b")
    assert "published figures are of other images" in Page(html).text
