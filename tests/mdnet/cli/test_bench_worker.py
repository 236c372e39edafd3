"""PyTorch as a contestant speaks the workers' protocol; `tests/runtime/bench/test_bench.py` runs bundles against it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdnet.cli.bench_worker import open_stages
from mdnet.model.config import preset

COMMAND = [sys.executable, "-m", "mdnet.cli.bench_worker", "--threads", "1", "--batch-size", "2"]


def test_a_stage_in_gives_its_seconds_out_until_the_input_ends() -> None:
    stages = ["graphs", "encoder", "vim", "fusion"]
    result = subprocess.run(
        [*COMMAND, "--preset", "demo"], input="\n".join(stages), capture_output=True, text=True, check=True
    )
    ready, *seconds = result.stdout.splitlines()
    assert json.loads(ready)["images_per_run"] == dict.fromkeys(stages, 2)
    assert len(seconds) == 4
    assert all(float(each) > 0 for each in seconds)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--preset", "huge"], 2, "no preset 'huge'; there are: "),
        (["--preset", "demo", "--image-size", "100"], 2, "image_size is 100; "),
    ],
)
def test_what_it_can_not_be_is_one_line(options: list[str], code: int, message: str) -> None:
    result = subprocess.run([*COMMAND, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)


def test_without_pytorch_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = subprocess.run([*COMMAND, "--preset", "demo"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "torch is not installed; it comes with the extra mdnet[train]\n"


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
