"""The evaluation's page: the benchmark's figures, published ones beside them, charts to measure, nothing loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from pages import Page, axis, chart, dots, loads_nothing

from mdnet.cli.main import main
from mdnet.data.rated import Rated, Scale
from mdnet.data.scut_fbp5500 import GROUPS, Protocol, read_splits
from mdnet.evaluation.baselines import GROUP_MEAN, RIDGE
from mdnet.evaluation.protocols import Benchmark, SplitResult
from mdnet.evaluation.published import PUBLISHED
from mdnet.evaluation.report_page import render_report
from mdnet.evaluation.scored_model import ScoredModel, TrainedEpoch, epochs_of
from mdnet.model.checkpoint import demo_checkpoint
from mdnet_engines.bundle.manifest import Training
from mdnet_engines.report.charts import MAX_POINTS
from mdnet_engines.report.thumbnails import thumbnail
from mdnet_rt.images.preprocess import load_image


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


def with_baselines(result: Benchmark) -> Benchmark:
    rng = np.random.default_rng(8)
    splits = [
        dataclasses.replace(
            split, baselines={name: split.test.ratings + rng.normal(0, sd, len(split.test)) for name, sd in NOISE}
        )
        for split in result.splits
    ]
    return dataclasses.replace(result, splits=splits)


NOISE = ((GROUP_MEAN, 2.0), (RIDGE, 1.0))


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_baselines_stand_below_the_model_with_all_figures(protocol: Protocol) -> None:
    result = with_baselines(benchmark(protocol))
    rows = table(Page(render_report(result, facts={})), "baselines")
    assert list(rows) == ["this model", GROUP_MEAN, RIDGE]
    for name, baseline in (("this model", None), (GROUP_MEAN, GROUP_MEAN), (RIDGE, RIDGE)):
        spread = result.spread(baseline=baseline)
        shown = [f"{spread.mean[each]:.4f}" for each in ("pearson", "mae", "rmse")]
        assert [cell.split(" ± ")[0] for cell in rows[name]] == [str(spread.images), *shown]


def test_without_a_ridge_the_page_says_what_it_takes() -> None:
    result = benchmark("60-40")
    assert "baselines" not in Page(render_report(result, facts={})).tables
    alone = dataclasses.replace(result.splits[0], baselines={GROUP_MEAN: result.splits[0].scores})
    text = " ".join(Page(render_report(dataclasses.replace(result, splits=[alone]), facts={})).text.split())
    assert "A ridge on the frozen features takes a checkpoint and --cache" in text


def test_each_groups_charts_show_its_images_on_one_scale() -> None:
    result = benchmark("60-40")
    html = render_report(result, facts={})
    (split,) = result.splits
    ticks = []
    for row, group in enumerate(sorted(GROUPS), start=1):
        rows = np.array(split.test.groups) == group
        ratings, scores = split.test.ratings[rows], split.scores[rows]
        for name, ys in ((f"scatter-{row}", scores), (f"residuals-{row}", scores - ratings)):
            svg = chart(html, name)
            to_x, to_y = axis(svg, "x"), axis(svg, "y")
            read = [(to_x(x), to_y(y)) for x, y in dots(svg)]
            np.testing.assert_allclose(read, np.column_stack([ratings, ys]), atol=5e-4)
        ticks.append([each.text for each in chart(html, f"scatter-{row}").findall("text[@class='x-tick']")])
        assert f"{group}: score against mean rating" in html
    assert all(each == ticks[0] for each in ticks)


def test_of_many_groups_the_largest_are_drawn_and_one_group_is_not_drawn_again() -> None:
    model = benchmark("60-40").splits[0].model
    names = [f"g{n:02}" for n in range(15) for _ in range(n + 2)]
    test = Rated([Path(f"{n}.jpg") for n in range(len(names))], np.linspace(1, 5, len(names), dtype=np.float32), names)
    result = Benchmark("60-40", "d", [SplitResult("60-40", model, test, np.linspace(5, 1, len(names)))], [])
    html = render_report(result, facts={})
    assert "the 12 largest groups" in html
    assert html.count('<svg id="scatter-') == 12
    assert "g02: score" not in html
    one = dataclasses.replace(result.splits[0], test=Rated(test.images, test.ratings, ["all"] * len(names)))
    assert '<svg id="scatter-1' not in render_report(dataclasses.replace(result, splits=[one]), facts={})


def test_the_training_curve_is_what_the_checkpoint_kept() -> None:
    result = benchmark("60-40")
    epochs = tuple(TrainedEpoch(n, 1 / n, n / 10) for n in range(3, 8))
    model = dataclasses.replace(result.splits[0].model, epochs=epochs, best_epoch=6)
    result = dataclasses.replace(result, splits=[dataclasses.replace(result.splits[0], model=model)])
    html = render_report(result, facts={})
    loads_nothing(html)
    for name, figure in (("loss-1", "loss"), ("validation_pearson-1", "validation_pearson")):
        svg = chart(html, name)
        to_x, to_y = axis(svg, "x"), axis(svg, "y")
        read = [(to_x(x), to_y(y)) for x, y in dots(svg)]
        np.testing.assert_allclose(read, [(each.number, getattr(each, figure)) for each in epochs], atol=1e-3)
        (ring,) = svg.findall("g[@class='rings']/circle")
        assert to_x(float(ring.attrib["cx"])) == pytest.approx(6, abs=1e-3)
    assert "Epochs before 3 ran before the run was resumed" in " ".join(Page(html).text.split())
    assert "Training loss" not in render_report(benchmark("60-40"), facts={})


@pytest.mark.parametrize(
    "epochs",
    [
        None,
        "many",
        [None, 3, {}],
        [{"number": "1", "loss": 1.0, "validation_pearson": 0.5}],
        [{"number": 1, "loss": float("nan"), "validation_pearson": 0.5}],
        [{"number": 1, "loss": 1e300, "validation_pearson": True}],
    ],
)
def test_notes_of_any_kind_make_no_curve(epochs: object) -> None:
    assert epochs_of({"epochs": epochs}) == ()


def test_epochs_are_read_in_order_with_whatever_else_they_hold() -> None:
    kept = [{"number": n, "of": 9, "loss": 0.5, "validation_pearson": 0.1 * n, "learning_rate": 1e-3} for n in (2, 1)]
    assert epochs_of({"epochs": kept}) == (TrainedEpoch(1, 0.5, 0.1), TrainedEpoch(2, 0.5, 0.2))


def test_pictures_of_the_largest_errors_are_shown_only_where_they_are_asked_for(faces: Path) -> None:
    (split,) = read_splits(faces, "60-40")
    scores = split.test.ratings + np.linspace(-1, 1.1, len(split.test))
    model = benchmark("60-40").splits[0].model
    result = Benchmark("60-40", "d", [SplitResult("60-40", model, split.test, scores)], [])
    without = render_report(result, facts={})
    assert "img" not in Page(without).tags()
    html = render_report(result, facts={}, pictures=True)
    loads_nothing(html)
    shown = [each["src"] for tag, each in Page(html).elements if tag == "img"]
    order = np.argsort(-np.abs(scores - split.test.ratings))[:10]
    assert shown == [thumbnail(load_image(split.test.images[row], 128), 128).source for row in order]
    assert "share it as you would the photographs" in Page(html).text


def test_the_command_writes_the_page(faces: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["evaluate", str(demo_checkpoint()), "--data", str(faces), "--report", str(file)])
    assert done.exit_code == 0, done.stderr
    html = file.read_text(encoding="utf-8")
    loads_nothing(html)
    shown = table(Page(html), "splits")["60-40"]
    assert done.stdout.startswith(f"60-40: PC {shown[1]}  MAE {shown[2]}  RMSE {shown[3]} on {shown[0]} test images; b")
    assert "published figures are of other images" in Page(html).text
