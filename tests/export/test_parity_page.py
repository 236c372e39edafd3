"""The parity report: JSON that any parser reads back, and one page that shows what was measured and loads nothing."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import Page, axis, chart, dots, is_tick, loads_nothing

from mdnet_engines.errors import BundleError
from mdnet_engines.parity.report import Gate, ParityReport, RatingParity, ScorePair, TensorParity
from mdnet_engines.parity.report_json import from_json, to_json
from mdnet_engines.report.charts import MAX_POINTS
from mdnet_export.parity_page import render_html

PASSING = Gate("max |Δscore|", 0.004, True, 0.02)
FAILING = Gate("Pearson", 0.97, False, 0.999)
SKIPPED = Gate("Spearman", None, False, 0.99, note="the reference scores hardly vary")


def make_report(
    scores: list[ScorePair] | None = None, gates: list[Gate] | None = None, forced: bool = False
) -> ParityReport:
    return ParityReport(
        precision="fp16",
        backend="onnxruntime-cpu",
        source="12 drawn faces",
        graphs={
            "encoder": {"features_16": TensorParity(0.99997, 41.5, 0.03), "mid": TensorParity(0.9998, 39.25, 0.05)},
            "fusion": {"score": TensorParity(1.0, math.inf, 0.0)},
        },
        scores=[ScorePair("a.jpg", 2.5, 2.503), ScorePair("b.jpg", 3.5, 3.499)] if scores is None else scores,
        gates=[PASSING, SKIPPED] if gates is None else gates,
        forced=forced,
    )


def render(report: ParityReport, title: str = "Parity", **facts: str) -> str:
    return render_html(report, title=title, facts=facts)


def random_pairs(count: int, spread: float = 0.01) -> list[ScorePair]:
    rng = random.Random(5)
    references = [rng.uniform(1, 5) for _ in range(count)]
    return [ScorePair(f"{i:05}.jpg", value, value + rng.gauss(0, spread)) for i, value in enumerate(references)]


# --- JSON ---


def test_report_survives_json() -> None:
    report = make_report(gates=[PASSING, FAILING, SKIPPED], forced=True)
    assert from_json(json.loads(json.dumps(to_json(report)))) == report


def test_json_is_strict_and_keeps_nan_and_infinities() -> None:
    report = make_report(
        scores=[ScorePair("NaN", math.nan, -math.inf)],
        gates=[Gate("max", math.nan, True, 0.1), Gate("snr", math.inf, False, 30.0)],
    )
    text = json.dumps(to_json(report), allow_nan=False)
    assert repr(from_json(json.loads(text))) == repr(report)  # repr: NaN != NaN


def test_json_takes_numpy_scalars() -> None:
    report = make_report(
        scores=[ScorePair("a.jpg", np.float32(2.5), np.float64(2.5))],
        gates=[Gate("max", np.float32(0.25), True, 0.5)],
    )
    assert json.loads(json.dumps(to_json(report)))["scores"][0]["reference"] == 2.5


def test_json_states_what_passed_and_what_was_not_evaluated() -> None:
    document = to_json(make_report(gates=[PASSING, FAILING, SKIPPED]))
    assert document["passed"] is False
    assert [gate["verdict"] for gate in document["gates"]] == ["pass", "fail", "not evaluated"]


def test_a_verdict_in_a_file_is_not_believed() -> None:
    document = to_json(make_report(gates=[FAILING]))
    document["passed"], document["gates"][0]["verdict"] = True, "pass"
    read = from_json(document)
    assert (read.passed, read.gates[0].verdict) == (False, "fail")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("gates"), "'gates' is missing"),
        (lambda d: d.update(precision=16), "expected text, got 16"),
        (lambda d: d["scores"][0].update(bundle="3.0"), "expected a number, got '3.0'"),
        (lambda d: d["gates"][0].update(at_most="yes"), "expected true or false"),
        (lambda d: d.update(graphs=[]), "graphs|items"),
        (lambda d: d.update(scores=3), "iterable"),
    ],
)
def test_malformed_json_is_a_bundle_error(edit: Any, message: str) -> None:
    document = to_json(make_report())
    edit(document)
    with pytest.raises(BundleError, match=message):
        from_json(document)


# --- the page as a whole ---


def test_page_loads_nothing_and_runs_nothing() -> None:
    html = render(make_report(), repository="see the project page")
    loads_nothing(html)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>alert(1)</script>.jpg", "<script>alert(1)</script>.jpg"),
        ('"><svg onload="x">.jpg', '"><svg onload="x">.jpg'),
        ("]]>{{ 7*7 }}{% raw %}.jpg", "]]>{{ 7*7 }}{% raw %}.jpg"),
        (b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), r"caf\udce9.jpg"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("two\nlines\x1b[31m.jpg", r"two\nlines\x1b[31m.jpg"),
        ("脸-é.jpg", "脸-é.jpg"),
    ],
)
def test_hostile_text_is_shown_and_changes_nothing(name: str, shown: str) -> None:
    plain = Page(render(make_report(scores=[ScorePair("x", 2.0, 2.5)]), title="x", x="x"))
    report = make_report(scores=[ScorePair(name, 2.0, 2.5)])
    html = render_html(report, title=name, facts={name: name})
    html.encode("utf-8")
    page = Page(html)
    assert page.elements == plain.elements
    assert page.tables["worst"][1][0] == shown
    assert page.text.count(shown) >= 5  # title, heading, fact name, fact, table row, tooltip
    assert shown in str(chart(html, "scatter").findtext("g[@class='rings']/circle/title"))


def test_hostile_gate_and_graph_names_are_escaped() -> None:
    report = ParityReport("<b>", "<i>", "<u>", {"<s>": {"<q>": TensorParity(1, 1, 1)}}, [], [Gate("<a>", 2, True, 1)])
    page = Page(render(report))
    assert {"<b>", "<i>", "<u>", "<s>", "<q>", "<a>"} <= set(re.findall(r"<\w>", page.text))
    assert not {"i", "u", "s", "q", "a"} & set(page.tags())


def test_facts_are_shown_and_cannot_contradict_the_report() -> None:
    page = Page(render(make_report(), preset="sd15-vim-s", precision="int8"))
    facts = [row for row in page.tables[None] if len(row) == 2]
    assert ["preset", "sd15-vim-s"] in facts
    assert ["precision", "fp16"] in facts
    assert "int8" not in page.text


def test_tables_and_charts_are_described_for_screen_readers() -> None:
    html = render(make_report())
    page = Page(html)
    assert all(attributes.get("scope") for tag, attributes in page.elements if tag == "th")
    assert page.tags().count("caption") == page.tags().count("table") == 5
    for name in ("scatter", "histogram"):
        svg = chart(html, name)
        ids = {element.get("id"): element.text for element in svg if element.tag in ("title", "desc")}
        assert svg.get("role") == "img"
        assert all(ids[label] for label in svg.attrib["aria-labelledby"].split())


# --- verdict and gates ---


@pytest.mark.parametrize(
    ("gates", "forced", "verdict"),
    [
        ([PASSING, SKIPPED], False, "PASSED"),
        ([PASSING], True, "PASSED"),
        ([PASSING, FAILING], False, "FAILED"),
        ([PASSING, FAILING], True, "FORCED"),
        ([Gate("max", math.nan, True, 0.1)], False, "FAILED"),
        ([SKIPPED], False, "NOT CHECKED"),
        ([], False, "NOT CHECKED"),
    ],
)
def test_verdict(gates: list[Gate], forced: bool, verdict: str) -> None:
    text = Page(render(make_report(gates=gates, forced=forced))).text
    assert [word for word in ("PASSED", "FAILED", "FORCED", "NOT CHECKED") if word in text] == [verdict]


@pytest.mark.parametrize("forced", [False, True])
def test_verdict_names_the_failed_gates_and_no_other(forced: bool) -> None:
    text = Page(render(make_report(gates=[PASSING, FAILING, SKIPPED], forced=forced))).text
    verdict = text[: text.index("What was measured")]
    assert "1 of 2 gates fails" in verdict
    assert "Pearson is 0.97, must be ≥ 0.999" in verdict
    assert PASSING.name not in verdict


@pytest.mark.parametrize(
    ("gates", "sentence"),
    [
        ([PASSING, SKIPPED], "One gate was not evaluated; of it nothing is known"),
        ([FAILING, SKIPPED, SKIPPED], "2 gates were not evaluated; of them nothing is known"),
        ([SKIPPED], "No gate was evaluated"),
    ],
)
def test_verdict_says_loudly_what_was_not_evaluated_and_why(gates: list[Gate], sentence: str) -> None:
    text = " ".join(Page(render(make_report(gates=gates))).text.split())
    verdict = text[: text.index("What was measured")]
    assert sentence in verdict
    assert SKIPPED.name in verdict
    assert SKIPPED.note in verdict


def test_verdict_with_every_gate_evaluated_mentions_no_gap() -> None:
    assert "not evaluated" not in Page(render(make_report(gates=[PASSING]))).text


def test_gate_table_says_each_state_in_words() -> None:
    rows = Page(render(make_report(gates=[PASSING, FAILING, SKIPPED]))).tables["gates"]
    assert rows[1:] == [
        ["max |Δscore|", "0.004", "≤ 0.02", "✓ pass"],
        ["Pearson", "0.97", "≥ 0.999", "✗ FAIL"],
        ["Spearman", "–", "≥ 0.99", "⚠ not evaluated"],
        ["the reference scores hardly vary"],
    ]


@pytest.mark.parametrize(
    ("gate", "shown"),
    [
        (Gate("max", 0.02000000001, True, 0.02), "0.02000000001"),
        (Gate("cosine", 0.99999997, False, 0.999), "0.99999997"),
        (Gate("max", 0.02, True, 0.02), "0.02"),
        (Gate("max", math.nan, True, 0.02), "NaN"),
        (Gate("max", math.inf, True, 0.02), "∞"),
        (Gate("bias", -0.5, False, 0.0), "−0.5"),
    ],
)
def test_a_value_is_never_rounded_onto_its_limit_or_to_one(gate: Gate, shown: str) -> None:
    assert Page(render(make_report(gates=[gate]))).tables["gates"][1][1] == shown


def test_graph_table_has_a_row_per_output() -> None:
    rows = Page(render(make_report())).tables["graphs"]
    assert rows[1:] == [
        ["encoder", "features_16", "0.99997000", "41.5", "0.03"],
        ["mid", "0.99980000", "39.25", "0.05"],
        ["fusion", "score", "1.00000000", "∞", "0"],
    ]


def test_ratings_are_a_table_by_group_where_there_are_any() -> None:
    assert "ratings" not in Page(render(make_report())).tables
    parts = [RatingParity("all", 300, 0.5432, 0.5419, 0.012, 0.003), RatingParity("<b>", 120, math.nan, 0.5, 0.01, 0.1)]
    rows = Page(render(replace(make_report(), ratings=parts))).tables["ratings"]
    assert rows[1:] == [
        ["all", "300", "0.5432", "0.5419", "+0.0013", "0.012", "0.30 %"],
        ["<b>", "120", "–", "0.5000", "–", "0.01", "10.00 %"],
    ]


# --- scores ---


def test_summary_is_over_the_deltas() -> None:
    deltas = [0.25, -0.75, 0.5, 0.0]
    page = Page(render(make_report(scores=[ScorePair(f"{d}", 3.0 + d * d, 3.0 + d * d + d) for d in deltas])))
    rows = dict(row for row in page.tables[None] if len(row) == 2)
    assert (rows["images"], rows["Δ mean (bias)"], rows["|Δ| mean"]) == ("4", "0", "0.375")
    assert (rows["|Δ| median"], rows["|Δ| maximum"]) == ("0.375", "0.75")
    assert rows["bundle scores"] == "2.81250 to 3.75000"


def test_worst_images_come_first_and_a_nan_is_the_worst() -> None:
    pairs = [ScorePair(f"{i}.jpg", 3.0, 3.0 + (-1) ** i * i / 64) for i in range(20)]
    for at in (0, 7, 22):  # a sort that compares NaNs goes wrong at some places only
        pairs.insert(at, ScorePair("broken.jpg", 3.0, math.nan))
    rows = Page(render(make_report(scores=pairs))).tables["worst"][1:]
    assert [row[0] for row in rows] == ["broken.jpg"] * 3 + [f"{i}.jpg" for i in range(19, 12, -1)]
    assert rows[0][1:] == ["3.00000", "NaN", "NaN"]
    assert rows[3][1:] == ["3.00000", "2.70312", "−0.297"]


def test_worst_images_are_pictured_where_their_pixels_are_given() -> None:
    pixels = np.full((192, 96, 3), 200, np.uint8)
    html = render_html(make_report(), title="Parity", facts={}, pictures={"b.jpg": pixels})
    loads_nothing(html)
    (image,) = [attributes for tag, attributes in Page(html).elements if tag == "img"]
    assert (image["alt"], image["width"], image["height"]) == ("", "48", "96")
    assert [row[0] for row in Page(html).tables["worst"][1:]] == ["a.jpg", "b.jpg"]


def test_scatter_dots_sit_at_their_scores() -> None:
    pairs = random_pairs(50, spread=0.5)
    svg = chart(render(make_report(scores=pairs)), "scatter")
    to_x, to_y = axis(svg, "x"), axis(svg, "y")
    read = [(to_x(x), to_y(y)) for x, y in dots(svg)]
    # Positions are written to 0.01 units of 368 that span at most 8 rating points: 1e-4 each way, some for the fit.
    np.testing.assert_allclose(read, [(p.reference, p.bundle) for p in pairs], atol=5e-4)


def test_identity_line_joins_equal_scores() -> None:
    svg = chart(render(make_report(scores=random_pairs(50, spread=0.5))), "scatter")
    to_x, to_y = axis(svg, "x"), axis(svg, "y")
    line = next(e.attrib for e in svg.findall("line") if e.get("class") == "identity")
    for end in "12":
        assert to_x(float(line[f"x{end}"])) == pytest.approx(to_y(float(line[f"y{end}"])), abs=5e-4)


def test_worst_images_are_ringed_and_named() -> None:
    pairs = [*random_pairs(30, spread=0.001), ScorePair("outlier.jpg", 2.0, 4.5)]
    svg = chart(render(make_report(scores=pairs)), "scatter")
    rings = svg.findall("g[@class='rings']/circle")
    assert len(rings) == 10
    assert rings[0].findtext("title") == "outlier.jpg: 2.00000 → 4.50000"
    assert (
        axis(svg, "x")(float(rings[0].attrib["cx"])),
        axis(svg, "y")(float(rings[0].attrib["cy"])),
    ) == pytest.approx((2.0, 4.5), abs=5e-4)


def test_histogram_bars_count_every_image_once() -> None:
    pairs = [ScorePair("", 2.0, 2.0 + delta) for delta in [0.0] * 30 + [0.01] * 12 + [-0.02] * 5 + [0.5]]
    svg = chart(render(make_report(scores=pairs)), "histogram")
    to_x, to_y = axis(svg, "x"), axis(svg, "y")
    bars = [{k: float(v) for k, v in bar.attrib.items()} for bar in svg.findall("g[@class='bars']/rect")]
    counted = {round(float(to_x(bar["x"] + bar["width"] / 2)), 2): float(to_y(bar["y"])) for bar in bars}
    assert sum(int(str(bar.findtext("title")).split()[0]) for bar in svg.findall("g[@class='bars']/rect")) == 48
    assert counted[0.0] == pytest.approx(47, abs=0.1)  # bins are 0.1 wide, the middle one centred on zero
    assert counted[0.5] == pytest.approx(1, abs=0.1)


def test_ten_thousand_images_give_a_small_page_that_keeps_the_outlier() -> None:
    pairs = random_pairs(10_000)
    pairs[4321] = ScorePair("outlier.jpg", 3.0, 9.0)
    html = render(make_report(scores=pairs))
    svg = chart(html, "scatter")
    assert len(html.encode()) < 1_000_000
    assert len(dots(svg)) == MAX_POINTS == 2000
    assert f"Drawn are {MAX_POINTS} of 10000 images" in " ".join(Page(html).text.split())
    assert max(axis(svg, "y")(y) for _, y in dots(svg)) == pytest.approx(9.0, abs=1e-3)
    assert "10000 images by Δ" in html


def test_nothing_is_said_of_thinning_when_all_are_drawn() -> None:
    html = render(make_report(scores=random_pairs(MAX_POINTS)))
    assert len(dots(chart(html, "scatter"))) == MAX_POINTS
    assert "Drawn are" not in html


def test_scores_that_are_not_numbers_are_counted_and_not_drawn() -> None:
    pairs = [*random_pairs(5), ScorePair("nan", 3.0, math.nan), ScorePair("inf", math.inf, math.inf)]
    html = render(make_report(scores=pairs))
    assert "not a finite number: 2 of 7 images" in html
    assert len(dots(chart(html, "scatter"))) == 5


@pytest.mark.parametrize("scores", [[], [ScorePair("a.jpg", math.nan, math.nan)]])
def test_page_without_a_finite_score_says_so(scores: list[ScorePair]) -> None:
    html = render(make_report(scores=scores))
    assert "nothing to draw" in html
    assert "<svg" not in html


@pytest.mark.parametrize(
    "scores",
    [
        [ScorePair("one", 3.25, 3.5)],
        [ScorePair("one", 0.0, 0.0)],
        [ScorePair("same", 3.0, 3.0)] * 9,
        [ScorePair("all off by the same", 3.0, 2.75)] * 9,
        [ScorePair("one step of float32 apart", 3.0, 3.0000002)] * 2,
        [ScorePair("no difference", 1.5, 1.5), ScorePair("no difference", 4.5, 4.5)],
        [ScorePair("fp16 overflow", 3.0, 65504.0), ScorePair("fine", 2.0, 2.0)],
        [ScorePair("close", 3.00001, 3.00002), ScorePair("close", 3.00003, 3.00001)],
    ],
)
def test_degenerate_scores_keep_readable_axes(scores: list[ScorePair]) -> None:
    html = render(make_report(scores=scores))
    scatter, histogram = chart(html, "scatter"), chart(html, "histogram")
    for svg in (scatter, histogram):
        for name in "xy":
            labels = [str(tick.text) for tick in svg.findall("text") if is_tick(tick, name)]
            assert 2 <= len(labels) == len(set(labels)) <= 12
            # At 9.5 units a digit a label fits left of the axis, and x labels clear each other.
            assert max(map(len, labels)) <= 8
    for x, y in dots(scatter):
        assert 92 <= x <= 460
        assert 36 <= y <= 404


@settings(max_examples=60)
@given(st.lists(st.tuples(st.text(), st.floats(width=32), st.floats(width=32)), max_size=6))
def test_any_scores_and_names_give_a_page_and_strict_json(rows: list[tuple[str, float, float]]) -> None:
    report = make_report(scores=[ScorePair(*row) for row in rows])
    html = render(report)
    html.encode("utf-8")
    assert "nan" not in "".join(re.findall(r'(?:cx|cy|x|y|width|height)="([^"]*)"', html))
    if "<svg" in html:
        chart(html, "scatter")
        chart(html, "histogram")
    text = json.dumps(to_json(report), allow_nan=False)
    assert repr(from_json(json.loads(text))) == repr(report)
