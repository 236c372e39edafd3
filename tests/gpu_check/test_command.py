"""The command `benchmarks/gpu_check.py`: the dry run works, and what can't be meant is refused."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_scripts import REPOSITORY, STAGES, command, gpu_check, results


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answer, and the file's content as text."""
    folder = tmp_path_factory.mktemp("dry")
    # On a busy machine a stage may take several times its share.
    done = command("--dry-run", "-o", "dry.json", "--budget", "2400", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(done=done, text=(folder / "dry.json").read_text(), file=folder / "dry.json")


@pytest.mark.slow
def test_the_dry_run_has_every_stage_with_its_rows(dry_run: Any) -> None:
    read = results.read(dry_run.file)
    assert read.dry_run
    assert [stage.name for stage in read.stages] == STAGES
    for stage in read.stages:
        assert stage.rows, stage.name
        assert all(row.note for row in stage.rows if row.status != results.PASSED), stage.name
        assert stage.status in (results.PASSED, results.NOT_INSTALLED, results.NOT_SUPPORTED), stage


@pytest.mark.slow
def test_the_dry_run_runs_what_a_cpu_can(dry_run: Any) -> None:
    stages = {stage.name: stage for stage in results.read(dry_run.file).stages}
    for name in (
        "device",
        "scan",
        "scan time",
        "onnxruntime",
        "pytorch",
        "torch.compile",
        "end to end",
        "function body",
    ):
        assert stages[name].status == results.PASSED, stages[name]
    assert all(row.figures["cases"] > 1 for row in stages["scan"].rows if row.name.startswith(("float", "bfloat")))
    (batch,) = (row for row in stages["pytorch"].rows if row.name == "fp16, batch 2")
    assert {"images/s", "max |Δscore|", "batch against singles"} < batch.figures.keys()


@pytest.mark.slow
def test_a_pipe_gets_no_progress_and_the_file_no_places(dry_run: Any) -> None:
    assert dry_run.done.stderr == ""
    for place in (REPOSITORY, dry_run.file.parent, Path.home()):
        assert str(place) + os.sep not in dry_run.text


@pytest.mark.slow
def test_a_dry_run_is_no_evidence(dry_run: Any, tmp_path: Path) -> None:
    shutil.copy(dry_run.file, tmp_path / "cpu-2026-11-25.json")
    with pytest.raises(results.ResultError, match="dry run"):
        results.newest(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--dry-run"], 2, "needs -o"),
        (["--only", "nothing"], 2, "there are: device"),
        (["--budget", "0"], 2, "expected seconds"),
        (["bundles"], 2, "bundles takes a folder"),
        (["render", "x"], 2, "render takes no folder"),
    ],
)
def test_what_can_not_be_meant_is_refused(arguments: list[str], code: int, says: str) -> None:
    done = command(*arguments)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[-1]


def test_without_a_gpu_the_command_says_so_in_one_line(tmp_path: Path) -> None:
    done = command("-o", tmp_path / "x.json", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert re.fullmatch(r"error: there is no CUDA GPU here.*\n", done.stderr)
    assert not (tmp_path / "x.json").exists()


def test_no_run_overwrites_anothers_results(tmp_path: Path) -> None:
    file = tmp_path / "gpu-2026-11-25.json"
    for expected in ("gpu-2026-11-25.json", "gpu-2026-11-25-2.json", "gpu-2026-11-25-3.json"):
        unused = gpu_check.unused(file)
        assert unused.name == expected
        unused.touch()
