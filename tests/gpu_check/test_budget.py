"""All stages of `benchmarks/gpu_check.py` together keep to its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_scripts import DAY, check, results


def test_the_shares_fit_into_nine_minutes() -> None:
    assert check.BUDGET == 540
    assert sum(check.limits(check.STAGES, check.BUDGET)) <= check.BUDGET
    assert sum(check.limits(check.STAGES, 60)) <= 60


def test_a_stage_gets_what_those_before_it_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, given, written = [0.0], [], []
    took = {"a": 1.0, "b": 30.0, "c": 25.0, "d": 5.0}

    def run_stage(stage: Any, _setting: Any, limit: float, _environment: Any, _keep: Any) -> Any:
        given.append(limit)
        written.append(len(results.read(tmp_path / "out.json").stages))
        clock[0] += min(took[stage.name], limit)
        return results.StageResult(stage.name, "passed", took[stage.name], limit, "", (results.Row("x", "passed"),))

    monkeypatch.setattr(check, "run_stage", run_stage)
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])
    setting = check.Setting("cpu", "tiny", tmp_path, tmp_path, ())
    begin = results.Results("none", f"{DAY}T10:00:00+00:00", True, "command", {})
    stages = [check.Stage(name, "", check.BUDGET / 4) for name in took]
    run = check.run_stages(stages, setting, begin, tmp_path / "out.json", budget=80)
    assert given == [20, 39, 29, 24]
    assert written == [0, 1, 2, 3]  # after every stage
    assert results.read(tmp_path / "out.json") == run


def test_no_stage_begins_when_the_time_is_over(tmp_path: Path) -> None:
    setting = check.Setting("cpu", "tiny", tmp_path, tmp_path, ())
    done = check.run_stage(check.Stage("a", "broken:fine", 60), setting, 0.5, {})
    assert (done.status, done.rows) == ("not run", ())
