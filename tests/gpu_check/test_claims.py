"""The tables of docs/gpu.md and README say what the results of a run say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_scripts import DAY, REPOSITORY, STAGES, check, claims, render, results

GPU = "NVIDIA H100"


def row(name: str, status: str = "passed", note: str = "", **figures: float) -> Any:
    return results.Row(name, status, note, {key.replace("_", " "): value for key, value in figures.items()})


def rate(name: str, value: float, share: float = 0.1) -> Any:
    return results.Row(name, "passed", "", {"images/s": value, "of the matrix product's rate": share})


def scan_row(batch: int, times: float) -> Any:
    return results.Row(f"selective_scan.cu, float16, batch {batch}", "passed", "", {"× its floor": times})


ROWS = {
    "device": [row("facts")],
    "scan": [row("float32, forward"), row("bfloat16, reverse"), row("mamba-ssm's kernel and its gradient")],
    "scan time": [scan_row(64, 1.4), scan_row(1, 7.0)],
    "tensorrt demo": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 8", 9000)],
    "onnxruntime": [row("fp16, own op, parity"), rate("fp16, own op, batch 32", 1200, 0.4)],
    "pytorch": [rate("fp16, batch 32", 900)],
    "tensorrt fp16": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 32", 1500.4, 0.55)],
    "tensorrt int8": [row("int8, plans"), row("int8, parity"), rate("int8, batch 32", 1900)],
    "tensorrt fp8": [row("fp8, plans"), row("fp8, parity"), rate("fp8, batch 32", 2000)],
    "torch.compile": [rate("fp16, batch 32", 1000)],
    "tensorrt-rtx": [row("fp16, plans"), row("fp16, parity"), rate("fp16, batch 32", 1400)],
    "end to end": [rate("fp16, JPEG files", 1111)],
    "function body": [row("fp16, function body, one image")],
    "tests": [row("tests/export/test_gpu.py")],
    "sanitizer": [row("memcheck")],
}


def made_up(day: str = DAY, **changes: list[Any]) -> Any:
    """A run of which everything passed, but for the stages that are given otherwise (`_` for a space or a hyphen)."""
    changed = {name.replace("_", " "): rows for name, rows in changes.items()}
    stages = []
    for name, rows in ROWS.items():
        found = changed.get(name.replace("-", " ").replace(".", " "), rows)
        status = results.worst(each.status for each in found)
        note = next((f"{each.name}: {each.note}" for each in found if each.status == status and each.note), "")
        stages.append(results.StageResult(name, status, 10.0, 20.0, note, tuple(found)))
    return results.Results(GPU, f"{day}T10:00:00+00:00", False, "python benchmarks/gpu_check.py", {}, tuple(stages))


def ended(name: str, status: str, rows: list[Any]) -> Any:
    """A run in which all is well but for one stage, which did not come to its end."""
    run = made_up()
    changed = {"status": status, "note": "why", "rows": tuple(rows)}
    return replace(run, stages=tuple(replace(s, **changed) if s.name == name else s for s in run.stages))


def lines_of(run: Any) -> dict[str, str]:
    """The table of claims in docs/gpu.md: claim → its state."""
    found = re.findall(r"^\| (.+?) \| (.+) \|$", render.claims_table(run), re.MULTILINE)
    return {what: said for what, said in found if what not in ("on a GPU", "---")}


def test_without_results_every_claim_is_unverified() -> None:
    said = lines_of(None)
    assert [*said] == [claim.what for claim in claims.CLAIMS]
    assert all(text.endswith("*unverified*: no run on a GPU yet") for text in said.values())
    assert render.docs_block(None).count("*unverified*") == len(claims.GOALS) + 1
    assert "every GPU claim is *unverified*" in render.readme_block(None)


def test_committed_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    pages = [REPOSITORY / "docs" / "gpu.md", REPOSITORY / "README.md"]
    copies = [Path(shutil.copy(page, tmp_path)) for page in pages]
    for copy in copies:
        text = copy.read_text(encoding="utf-8")
        copy.write_text(text.replace(render.END, f"a line by hand\n{render.END}"), encoding="utf-8")
    render.render(REPOSITORY / "benchmarks" / "results", *copies)
    for page, copy in zip(pages, copies, strict=True):
        assert copy.read_bytes() == page.read_bytes(), "python benchmarks/gpu_check.py render"


def test_a_claim_whose_rows_passed_is_verified_with_gpu_and_day() -> None:
    said = lines_of(made_up())
    assert all(text.startswith(f"verified on {GPU}, {DAY}") for text in said.values()), said
    assert said["TensorRT 11 at full size, fp16"].endswith(": 1500 images/s at batch 32")
    assert said["selective scan on CUDA: `selective_scan.cu`"].endswith(": 1.40× its floor at batch 64")


def test_every_stage_has_made_up_rows_and_every_claim_a_stage() -> None:
    assert [*ROWS] == STAGES
    assert {claim.stage for claim in claims.CLAIMS} <= {*STAGES}


@pytest.mark.parametrize("status", ["timed out", "crashed"])
def test_a_claim_is_verified_though_its_stage_ended_in_a_row_of_another(status: str) -> None:
    rows = [row("float32, forward"), row("mamba-ssm's kernel and its gradient", status, "stopped after 40 s")]
    said = lines_of(ended("scan", status, rows))
    assert said["selective scan on CUDA: `selective_scan.cu`"].startswith(f"verified on {GPU}, {DAY}: 1.40×")
    assert said["selective scan on CUDA: mamba-ssm's kernel and its gradient, which training takes"] == (
        f"**{status}** on {GPU}, {DAY}: mamba-ssm's kernel and its gradient: stopped after 40 s"
    )


def test_a_claim_says_which_rows_its_stage_did_not_come_to() -> None:
    rows = [
        row("fp16, own op, parity"),
        rate("fp16, own op, batch 32", 1200),
        row("fp16, own op, batch 1", "timed out", "stopped after 45 s"),
        row("fp16, own op, batch 64", "not run", "the stage had ended"),
    ]
    said = lines_of(ended("onnxruntime", "timed out", rows))
    lacking = "without fp16, own op, batch 1 (timed out), fp16, own op, batch 64 (not run)"
    assert said["selective scan on CUDA: ONNX Runtime's operator"] == f"verified in part on {GPU}, {DAY}; {lacking}"
    assert said["ONNX Runtime CUDA, `--backend onnxruntime-cuda`"] == (
        f"verified in part on {GPU}, {DAY}: 1200 images/s at batch 32; {lacking}"
    )


@pytest.mark.parametrize("status", ["timed out", "crashed", "failed"])
def test_a_stage_that_went_wrong_before_its_first_row_fails_its_claims(status: str) -> None:
    said = lines_of(ended("scan", status, []))
    assert said["selective scan on CUDA: `selective_scan.cu`"] == f"**{status}** on {GPU}, {DAY}: why"


def test_a_stage_that_was_under_way_when_the_run_was_ended_has_failed_nothing() -> None:
    rows = [row("float32, forward", "not run", check.ENDED)]
    said = lines_of(ended("scan", "not run", rows))
    assert said["selective scan on CUDA: `selective_scan.cu`"].endswith(
        f"*unverified*: not run on {GPU}, {DAY} ({check.ENDED})"
    )


@pytest.mark.parametrize("status", ["failed", "crashed"])
def test_a_claim_with_a_bad_row_is_told_as_such_and_no_other_is(status: str) -> None:
    bad = [row("fp16, own op, parity", status, "score max |Δ|"), row("fp16, own op, batch 1")]
    said = lines_of(made_up(onnxruntime=bad))
    failed = [what for what, text in said.items() if text.startswith(f"**{status}** on {GPU}, {DAY}: ")]
    assert failed == [
        "selective scan on CUDA: ONNX Runtime's operator",
        "ONNX Runtime CUDA, `--backend onnxruntime-cuda`",
    ]
    assert "score max \\|Δ\\|" in said[failed[0]]  # a cell's own lines are not the table's


@pytest.mark.parametrize("status", ["not installed", "not supported", "not run"])
def test_what_could_not_run_stays_unverified_with_the_reason(status: str) -> None:
    rows = [row("fp16, plans", status, "tensorrt"), row("fp16, parity", status, "tensorrt")]
    text = lines_of(made_up(tensorrt_fp16=rows))["TensorRT 11 at full size, fp16"]
    assert text == (f"tested with stand-ins for GPU and builder; *unverified*: {status} on {GPU}, {DAY} (tensorrt)")


def test_plans_that_were_only_built_verify_nothing() -> None:
    rows = [row("fp16, plans"), row("fp16, parity", "not supported", "for RTX GPUs")]
    said = lines_of(made_up(tensorrt_rtx=rows))
    (text,) = (text for what, text in said.items() if what.startswith("TensorRT-RTX"))
    assert "*unverified*: not supported" in text


def test_a_claim_of_which_a_part_is_missing_says_which() -> None:
    rows = [row("fp16, own op, parity"), row("fp16, own op, batch 64", "not run", "1 s was left")]
    text = lines_of(made_up(onnxruntime=rows))["ONNX Runtime CUDA, `--backend onnxruntime-cuda`"]
    assert text == f"verified in part on {GPU}, {DAY}; without fp16, own op, batch 64 (not run)"


def test_no_figure_stands_without_gpu_and_day() -> None:
    for text in lines_of(made_up()).values():
        if re.search(r"\d images/s|\d×", text):
            assert f"{GPU}, {DAY}" in text
    docs = render.docs_block(made_up())
    goals, _, table = docs.partition(f"\n{GPU}, {DAY}, ")
    assert all(f"on {GPU}, {DAY}: " in line for line in goals.splitlines()[2:] if line)
    assert "1500" in table


def test_goals_are_met_or_missed_by_the_best_of_ours() -> None:
    def goals(run: Any) -> list[str]:
        return [claims.goal_state(goal, run).partition(" on ")[0] for goal in claims.GOALS]

    assert goals(made_up()) == ["met", "met", "met"]  # 1.4×; 1500 / 1000; 0.55
    slow = [row("fp16, parity"), rate("fp16, batch 32", 1250, 0.45)]
    assert goals(made_up(tensorrt_fp16=slow, tensorrt_rtx=slow, scan_time=[scan_row(64, 1.6)])) == ["missed"] * 3
    none = [row("fp16, batch 32", "not installed", "triton")]
    assert claims.goal_state(claims.GOALS[1], made_up(torch_compile=none)).startswith("*unverified*: not measured")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with these runs, and a file of another benchmark."""

    def make(*runs: Any) -> Path:
        (tmp_path / "scan-cpu.json").write_text('{"results": {}}')
        for number, run in enumerate(runs):
            results.write(run, tmp_path / f"{number}.json")
        return tmp_path

    return make


def test_the_newest_run_wins_by_its_own_date(folder: Callable[..., Path]) -> None:
    assert results.newest(folder(made_up("2026-12-01"), made_up("2026-11-30"))).day == "2026-12-01"


def test_a_folder_without_runs_has_none(folder: Callable[..., Path]) -> None:
    assert results.newest(folder()) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "has the schema 2; this version reads 1"),
        ({"schema": None}, "has the schema None"),
        ({"dry_run": True}, "is a dry run"),
        ({"date": "yesterday"}, "is not as gpu_check.py writes it"),
        ({"more": 1}, "is not as gpu_check.py writes it"),
        ({"stages": [{"name": "scan"}]}, "is not as gpu_check.py writes it"),
        (
            {"stages": [{"name": "scan", "status": "fine", "seconds": 1, "limit": 2, "note": "", "rows": []}]},
            "has the status 'fine'",
        ),
    ],
)
def test_a_file_that_is_not_known_is_refused(change: dict[str, Any], says: str, folder: Callable[..., Path]) -> None:
    place = folder(made_up())
    file = place / "0.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(results.ResultError, match=re.escape(says)) as caught:
        results.newest(place)
    assert "0.json" in str(caught.value)


def test_rendering_writes_between_the_marks_alone(folder: Callable[..., Path]) -> None:
    place = folder(made_up())
    pages = [place / "gpu.md", place / "README.md"]
    for page in pages:
        page.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    assert render.render(place, *pages) == pages
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"before\n{render.BEGIN}\n")
        assert text.endswith(f"{render.END}\nafter\n")
        assert "old" not in text
        assert GPU in text
    assert render.render(place, *pages) == []
    pages[0].write_text("no marks")
    with pytest.raises(results.ResultError, match=r"gpu\.md has not one place"):
        render.render(place, *pages)


def test_figures_that_are_not_finite_are_written_by_name(tmp_path: Path) -> None:
    figures = results.plain({"a": float("nan"), "b": float("inf"), "c": 1.23456789, "d": 3, "e": "x"})
    assert figures == {"a": "nan", "b": "inf", "c": 1.23457, "d": 3, "e": "x"}
