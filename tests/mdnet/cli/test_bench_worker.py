"""PyTorch as a contestant: it answers as workers do; `tests/runtime/bench/test_bench.py` runs bundles against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mdnet.cli.bench_worker import open_stages
from mdnet.model.config import preset
from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.system.child_process import Child

OPEN = {"ask": "open", "threads": 1, "batch_size": 2}


def started() -> Child:
    return Child(["-m", "mdnet.cli.bench_worker"], name="pytorch")


def test_each_stage_that_is_asked_for_gives_its_seconds() -> None:
    stages = ["graphs", "encoder", "vim", "fusion"]
    with started() as child:
        assert child.ask({**OPEN, "preset": "demo"})["images_per_run"] == dict.fromkeys(stages, 2)
        assert all(child.ask({"ask": "run", "stage": stage}) > 0 for stage in stages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "no preset 'huge'; known: "),
        ({"preset": "demo", "image_size": 100}, "image_size is 100; "),
    ],
)
def test_what_it_can_not_be_is_one_line(options: dict[str, Any], message: str) -> None:
    with started() as child, pytest.raises(UsageError, match=f"^{message}"):
        child.ask({**OPEN, **options})


def test_without_pytorch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with started() as child, pytest.raises(MDNetError, match=r"^torch is not installed; it comes with the extra mdnet"):
        child.ask({**OPEN, "preset": "demo"})


def test_its_stages_are_the_parts_of_one_model() -> None:
    before = torch.get_num_threads()
    try:
        stages, facts = open_stages(preset("demo"), 3, before)
    finally:
        torch.set_num_threads(before)
    features, tokens, scores = stages["encoder"](), stages["vim"](), stages["graphs"]()
    assert isinstance(features, dict)
    assert isinstance(tokens, torch.Tensor)
    assert isinstance(scores, torch.Tensor)
    assert {name: list(value.shape[1:]) for name, value in features.items()} | {
        "tokens": list(tokens.shape[1:])
    } == facts["shapes"]
    assert scores.shape == (3,)
    assert scores.is_inference()
    torch.testing.assert_close(scores, stages["fusion"]())
