"""`mdnet evaluate`: a checkpoint and the bundle built from it give one result; what can't be evaluated is explained."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mdnet.cli.main import main
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.evaluation.evaluate import evaluate
from mdnet.model.checkpoint import demo_checkpoint, load_checkpoint, save_checkpoint
from mdnet_engines.bundle.files import Bundle

HALVES = "train_test_files/split_of_60%training and 40%testing"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def result_of(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "result.json"
    done = run(*arguments, "--json", file)
    assert done.exit_code == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("protocol", ["60-40", "cv5"])
def test_checkpoint_and_its_fp32_bundle_agree(faces: Path, demo_bundle: Bundle, tmp_path: Path, protocol: str) -> None:
    ours = result_of(tmp_path, demo_checkpoint(), "--data", faces, "--protocol", protocol)
    theirs = result_of(tmp_path, demo_bundle.path, "--data", faces, "--protocol", protocol, "--batch-size", 5)
    assert [split["model"]["kind"] for split in (ours["splits"][0], theirs["splits"][0])] == ["checkpoint", "bundle"]
    pairs = list(zip(ours["splits"], theirs["splits"], strict=True))
    assert len(pairs) == (1 if protocol == "60-40" else 5)
    for one, other in pairs:
        # A score of the fp32 graphs is up to 1.2e-4 from PyTorch's (seen on 2,000 faces). No error figure can move by
        # more than the scores do, and 1e-3 is less than benchmark tables are compared by.
        for figure in ("pearson", "mae", "rmse"):
            assert one[figure] == pytest.approx(other[figure], abs=1e-3)
        scores = [np.array([row["score"] for row in split["predictions"]]) for split in (one, other)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-3)
        assert np.ptp(scores[0]) > 0.5  # faces are told apart, so that an image out of place would show
    for group, figures in ours["groups"].items():
        assert figures["mean"]["mae"] == pytest.approx(theirs["groups"][group]["mean"]["mae"], abs=1e-3)


def test_the_bundle_needs_nothing_of_training(faces: Path, demo_bundle: Bundle, tmp_path: Path) -> None:
    missing = ("torch", "diffusers", "safetensors", "jinja2", "markupsafe")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); from mdnet.cli.main import main; main()"
    arguments = [sys.executable, "-c", program, "evaluate", str(demo_bundle.path), "--data", str(faces)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == run(demo_bundle.path, "--data", faces).stdout
    done = subprocess.run([*arguments, "--report", "r.html"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "jinja2 is not installed; it comes with the extra mdnet[train]" in done.stderr


def test_lines_are_one_per_split_and_the_mean_over_folds(faces: Path) -> None:
    model = load_checkpoint(demo_checkpoint())
    folds = [evaluate(model, split.test) for split in read_splits(faces, "cv5")]
    *lines, mean = run(demo_checkpoint(), "--data", faces, "--protocol", "cv5").stdout.splitlines()
    assert [line.split(";")[0] for line in lines] == [f"fold {n}: {fold}" for n, fold in enumerate(folds, start=1)]
    column = np.array([fold.mae for fold in folds])
    assert mean.startswith("cv5: PC ")
    assert f"MAE {column.mean():.4f} ± {column.std(ddof=1):.4f}" in mean
    assert mean.split(";")[0].endswith("on 60 test images")


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_a_model_of_the_60_percent_split_gets_a_note_before_cv5(
    faces: Path, demo_bundle: Bundle, kind: str, tmp_path: Path
) -> None:
    model, said = tmp_path / f"model{'.safetensors' * (kind == 'checkpoint')}", {"data": "mine", "protocol": "60-40"}
    if kind == "checkpoint":
        save_checkpoint(load_checkpoint(demo_checkpoint()), model, notes=said)
    else:
        shutil.copytree(demo_bundle.path, model)
        manifest = json.loads((model / "manifest.json").read_text())
        manifest["provenance"]["training"] = said
        (model / "manifest.json").write_text(json.dumps(manifest))
    noted = [
        line for line in run(model, "--data", faces, "--protocol", "cv5").stderr.splitlines() if str(model) in line
    ]
    assert len(noted) == 1
    assert noted[0].startswith("note: ")
    assert "was trained with 60-40 of 'mine', so on the same data it has seen" in noted[0]
    assert str(model) not in run(model, "--data", faces).stderr


def test_five_models_may_be_checkpoints_and_bundles(faces: Path, demo_bundle: Bundle, tmp_path: Path) -> None:
    folds = [demo_checkpoint(), demo_bundle.path, *[demo_checkpoint()] * 3]
    document = result_of(tmp_path, *folds, "--data", faces, "--protocol", "cv5")
    assert [split["model"]["path"] for split in document["splits"]] == [str(path) for path in folds]


def test_nothing_but_results_is_on_standard_output_and_no_bar_in_a_pipe(faces: Path) -> None:
    done = run(demo_checkpoint(), "--data", faces)
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("60-40: PC ")
    rest = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert [re.sub("[0-9.]+", "#", line) for line in rest] == [
        "[# s] scoring # images: # of #",
        "[# s] scoring # images: # of #, # s",
    ]
    assert "\x1b" not in done.output


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_a_bar_counts_images_and_results_stay_on_standard_output(
    faces: Path, demo_bundle: Bundle
) -> None:
    import pty

    program = "from mdnet.cli.main import main; main()"
    arguments = [sys.executable, "-c", program, "evaluate", str(demo_bundle.path), "--data", str(faces)]
    terminal, slave = pty.openpty()
    drawn = b""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "TERM": "xterm"}
    ) as child:
        os.close(slave)
        with contextlib.suppress(OSError):  # how Linux ends a terminal that nobody has open any more
            while part := os.read(terminal, 4096):  # all the while: a full terminal would stop the child
                drawn += part
        assert child.stdout is not None
        results = child.stdout.read().decode()
    os.close(terminal)
    assert child.returncode == 0
    assert results == run(demo_bundle.path, "--data", faces).stdout
    assert b"24/24" in drawn


def test_a_damaged_image_is_an_error_that_names_it(faces: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(faces, root)
    (split,) = read_splits(root, "60-40")
    split.test.images[3].write_bytes(b"\xff\xd8\xff")
    done = run(demo_checkpoint(), "--data", root)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"error: {split.test.images[3]}: ")


@pytest.mark.parametrize(
    ("model", "data", "options", "code", "reason"),
    [
        ("demo", "nowhere", [], 2, "nowhere is neither SCUT-FBP5500 (no folder Images;"),
        ("demo", "lists", [], 1, "train.txt is missing, and 1 more; is the data set unpacked whole?"),
        ("demo", "lists", ["--protocol", "cv5"], 1, "train_1.txt is missing, and 9 more"),
        (
            "nothing",
            "faces",
            [],
            2,
            "nothing: no such file or folder; expected a checkpoint (.safetensors) or a bundle",
        ),
        ("folder", "faces", [], 2, "folder is neither a checkpoint nor a bundle: a folder without manifest.json"),
        ("text.txt", "faces", [], 1, "text.txt is not a safetensors file"),
        ("broken", "faces", [], 1, "manifest.json is not JSON"),
        ("demo", "faces", ["--protocol", "cv10"], 2, "unknown protocol 'cv10'; known: 60-40, cv5"),
        ("demo", "faces", ["--report", "missing/r.html"], 2, "--report takes a file in a folder that exists"),
        ("demo", "faces", ["--json", "folder"], 2, "--json takes a file in a folder that exists"),
    ],
)
def test_what_cannot_be_evaluated_is_explained(
    faces: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    data: str,
    options: list[str],
    code: int,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").symlink_to(faces)
    (tmp_path / "lists" / "Images").mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "manifest.json").write_text("{")
    (tmp_path / "text.txt").write_text("no weights")
    done = run(demo_checkpoint() if model == "demo" else model, "--data", data, *options)
    assert done.exit_code == code, done.output
    assert reason in done.stderr
    assert done.stdout == ""


def test_several_models_for_one_split_are_refused(faces: Path) -> None:
    done = run(demo_checkpoint(), demo_checkpoint(), "--data", faces)
    assert done.exit_code == 2
    assert "2 models for protocol 60-40; expected one" in done.stderr


def test_cuda_that_is_not_there_is_explained(faces: Path, demo_bundle: Bundle) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(demo_checkpoint(), "--data", faces, "--device", "cuda")
    assert (done.exit_code, "PyTorch finds no CUDA GPU; use --device cpu" in done.stderr) == (1, True)
