"""The whole way of a researcher with published files on disk, command by command, at the demo's size."""

from __future__ import annotations

import json
from pathlib import Path

import published_weights
import pytest
from click.testing import CliRunner

from mdnet.cli.main import main as mdnet
from mdnet.data.drawn_set import write_dataset
from mdnet.model.config import preset
from mdnet_export.cli.main import main as mdnet_export


def run(command: object, *words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("source", ["sd", pytest.param("sd.safetensors", marks=pytest.mark.slow)])
def test_import_cache_train_evaluate_build_evaluate(source: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    published_weights.main(tmp_path, preset("demo"))
    data = tmp_path / "SCUT-FBP5500"
    write_dataset(data, 40, seed=2)
    start, trained, bundle = tmp_path / "start.safetensors", tmp_path / "mine.safetensors", tmp_path / "bundle"
    cache, figures = tmp_path / "cache", {}

    run(mdnet, "import", "--sd", tmp_path / source, "--vim", tmp_path / "vim.pth", "-o", start)
    told = run(mdnet, "train", "--init", start, "--data", data, "--cache", cache, "--epochs", 3, "-o", trained)
    shards = sorted(cache.rglob("*.safetensors"))
    assert shards
    run(mdnet_export, "build", "--checkpoint", trained, "--num-images", 4, "-o", bundle)
    for model in (trained, bundle):
        file = tmp_path / f"{model.name}.json"
        evaluated = run(mdnet, "evaluate", model, "--data", data, "--json", file)
        assert evaluated.split(";")[0] == told.split(";")[0]  # then the baselines, of which evaluate has fewer
        figures[model] = json.loads(file.read_text())["splits"][0]

    scores = {model: [row["score"] for row in figures[model]["predictions"]] for model in figures}
    # Two runtimes in float32; the limit of the build's own gate.
    assert scores[bundle] == pytest.approx(scores[trained], abs=1e-3)
    assert len(set(scores[trained])) == 16  # the test list, and the model tells its images apart
    # A second model finds the first one's features.
    run(mdnet, "train", "--init", start, "--data", data, "--cache", cache, "--epochs", 1, "--fusion", "concatenation",
        "-o", tmp_path / "other.safetensors")  # fmt: skip
    assert sorted(cache.rglob("*.safetensors")) == shards
