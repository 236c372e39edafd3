"""`mdnet-rt compare`: two bundles on the same images, held to SciPy and to the scores' closed form."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper
from PIL import Image
from scipy import stats

from mdnet_engines.bundle.manifest import MANIFEST_NAME
from mdnet_rt.bench.compare import Comparison, compare_bundles, places
from mdnet_rt.cli.main import main
from mdnet_rt.images.preprocess import load_image
from mdnet_rt.rows.result import Stamp
from mdnet_rt.scoring.scorer import Scorer
from mdnet_rt.sources.entry import Entry

Photo = Callable[..., Path]
Formula = Callable[[np.ndarray], float]
Builders = dict[str, Callable[..., onnx.ModelProto]]
OPTIONS = ("--backend", "onnxruntime-cpu", "--threads", "1")
RED = np.array([0.9, -0.2, 0.1], np.float32)  # weights of the other bundle's channel means


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["compare", *(str(arg) for arg in args), *OPTIONS])


@pytest.fixture(scope="module")
def other(make_bundle: Callable[..., Path], graphs: Builders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the good bundle, with other weights of the channel means; it can score an image that is all black."""
    fusion, vim = graphs["fusion"](), graphs["vim"]()
    replace_constant(fusion, "mean_weights", RED)
    # log(max) → max: finite for black.
    log = next(node for node in vim.graph.node if node.op_type == "Log")
    log.op_type = "Identity"
    return make_bundle(tmp_path_factory.mktemp("other") / "bundle", fusion=fusion, vim=vim)


@pytest.fixture
def photos(photo: Photo, tmp_path: Path) -> Path:
    for seed in range(7):
        photo(f"photos/{seed}.png", seed=seed, shape=(4 + seed, 5))
    return tmp_path / "photos"


def replace_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    (constant,) = (each for each in model.graph.initializer if each.name == name)
    constant.CopyFrom(numpy_helper.from_array(value, name))


def other_score(image: np.ndarray) -> float:
    pixels = image.astype(np.float64) / 255
    return float(3 + pixels.mean((0, 1)) @ RED + pixels[0, 0] @ [0.2, 0.1, 0.05] + pixels.max() / 4)


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [1.0, 1.0, 2.0, 1.0, 2.0], [5.0], []])
def test_ranks_are_scipys_from_the_highest_down(values: list[float]) -> None:
    np.testing.assert_array_equal(places(values), stats.rankdata([-value for value in values]))


def test_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    a = random.normal(3, 0.5, 200).round(1)  # with ties
    b = (a + random.normal(0, 0.3, 200)).round(1)
    found = Comparison([str(i) for i in range(200)], a.tolist(), b.tolist())
    summary = found.summary()
    assert summary["pearson"] == pytest.approx(stats.pearsonr(a, b).statistic)
    assert summary["spearman"] == pytest.approx(stats.spearmanr(a, b).statistic)
    assert summary["max_abs"] == pytest.approx(max(abs(y - x) for x, y in zip(a, b, strict=True)))
    assert summary["p99_abs"] == pytest.approx(stats.scoreatpercentile(np.abs(b - a), 99))
    assert summary["mean_abs"] == pytest.approx(sum(abs(b - a)) / 200)
    assert summary["mean"] == pytest.approx(b.mean() - a.mean())


def test_a_constant_score_has_no_correlation() -> None:
    summary = Comparison(["x", "y"], [1.0, 2.0], [3.0, 3.0]).summary()
    assert summary["pearson"] is None
    assert summary["spearman"] is None
    assert Comparison().summary()["max_abs"] is None


def test_speed_is_the_median_of_the_pairs() -> None:
    found = Comparison(seconds=[(2, 1.0, 2.0), (2, 4.0, 1.0), (1, 3.0, 1.0)])
    summary = found.summary()
    assert summary["speed_ratio"] == 3.0
    assert summary["a_images_per_second"] == pytest.approx(1 / 2)  # 0.5, 2 and 3 seconds for an image
    assert summary["b_images_per_second"] == pytest.approx(1.0)


def test_the_worst_rows_are_the_furthest_and_the_most_moved() -> None:
    found = Comparison(["w", "x", "y", "z"], [4.0, 3.0, 2.0, 1.0], [4.5, 2.9, 2.95, 1.0])
    assert [pair.image for pair in found.furthest(2)] == ["y", "w"]
    assert [pair.image for pair in found.furthest(9)] == ["y", "w", "x"]
    moved = [(pair.image, pair.rank_a, pair.rank_b, pair.move) for pair in found.most_moved(9)]
    assert moved == [("x", 2, 3, -1), ("y", 3, 2, 1)]
    tied = Comparison(["w", "x", "y"], [3.0, 2.0, 1.0], [2.0, 2.0, 1.0])
    assert [(pair.image, pair.move) for pair in tied.most_moved(9)] == [("w", -0.5), ("x", 0.5)]


def test_scores_are_each_bundles_own(
    shared_bundle: Path, other: Path, photos: Path, expected_score: Formula, tmp_path: Path
) -> None:
    out = tmp_path / "found.json"
    result = run(shared_bundle, other, "--images", photos, "--batch-size", 3, "--worst", 7, "-o", out)
    assert result.exit_code == 0, result.stderr
    found = json.loads(out.read_text())
    images = {str(file): load_image(file, 32) for file in sorted(photos.iterdir())}
    a = {name: expected_score(image) for name, image in images.items()}
    b = {name: other_score(image) for name, image in images.items()}
    rows = found["furthest_apart"]
    assert {row["image"] for row in rows} == set(images)
    for row in rows:
        assert row["a"] == pytest.approx(a[row["image"]], abs=1e-5)
        assert row["b"] == pytest.approx(b[row["image"]], abs=1e-5)
    deltas = np.array([b[name] - a[name] for name in images])
    assert [abs(row["delta"]) for row in rows] == pytest.approx(sorted(abs(deltas), reverse=True), abs=1e-5)
    summary = found["summary"]
    assert (summary["images"], summary["scored_by_both"]) == (7, 7)
    assert summary["mean"] == pytest.approx(deltas.mean(), abs=1e-5)
    assert summary["pearson"] == pytest.approx(stats.pearsonr([*a.values()], [*b.values()]).statistic, abs=1e-4)
    assert summary["speed_ratio"] > 0
    with Scorer.open(other, backend="onnxruntime-cpu") as scorer:
        assert found["b"]["digest"] == Stamp.of(scorer.manifest).bundle
    assert found["a"]["digest"] != found["b"]["digest"]
    assert found["failures"] == []
    assert f"{summary['max_abs']:.3g}" in result.stdout
    assert "7: 7 scored by both" in result.stdout


def test_images_that_only_one_can_score_are_listed_and_give_1(
    shared_bundle: Path, other: Path, photos: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40)).save(photos / "black [bold].png")
    (photos / "text.jpg").write_text("not an image")
    out = tmp_path / "found.json"
    result = run(shared_bundle, other, "--images", photos, "-o", out)
    assert result.exit_code == 1
    found = json.loads(out.read_text())
    summary = found["summary"]
    assert [summary[name] for name in ("images", "scored_by_both", "only_a", "only_b", "neither")] == [9, 7, 0, 1, 1]
    reasons = {Path(failure["image"]).name: (failure["a"], failure["b"]) for failure in found["failures"]}
    black_a, black_b = reasons["black [bold].png"]
    assert "not finite" in black_a
    assert black_b is None
    assert all("not an image" in reason for reason in reasons["text.jpg"])
    assert "7 scored by both, 1 by B alone, 1 by neither" in result.stdout
    assert "black [bold].png" in result.stdout
    turned = run(other, shared_bundle, "--images", photos)
    assert turned.exit_code == 1
    assert "1 by A alone, 1 by neither" in turned.stdout


def test_no_image_at_all_scored_is_told_without_figures(shared_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("not an image")
    out = tmp_path / "found.json"
    result = run(shared_bundle, shared_bundle, "--images", tmp_path / "a.jpg", "--json", out)
    assert result.exit_code == 1
    assert json.loads(out.read_text())["summary"]["max_abs"] is None
    assert "1: 0 scored by both, 1 by neither" in result.stdout


def test_each_bundle_gets_its_own_image_size(
    shared_bundle: Path,
    make_bundle: Callable[..., Path],
    graphs: Builders,
    photos: Path,
    expected_score: Formula,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(graphs["encoder"].__globals__, "SIZE", 48)  # what conftest.py builds graphs and manifest with
    larger = make_bundle(tmp_path / "larger")
    out = tmp_path / "found.json"
    result = run(shared_bundle, larger, "--images", photos, "-o", out)
    assert result.exit_code == 0, result.stderr
    found = json.loads(out.read_text())
    assert (found["a"]["image_size"], found["b"]["image_size"]) == (32, 48)
    for row in found["furthest_apart"]:
        for name, size in (("a", 32), ("b", 48)):
            assert row[name] == pytest.approx(expected_score(load_image(row["image"], size)), abs=1e-5)


def test_other_scales_are_told_of_in_one_line(shared_bundle: Path, bundle: Path, photos: Path) -> None:
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    manifest["score"]["maximum"] = 10
    (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
    result = run(shared_bundle, bundle, "--images", photos)
    assert result.exit_code == 0
    (note,) = (line for line in result.stderr.splitlines() if line.startswith("note:"))
    assert "1 to 5 and 1 to 10" in note
    assert "note:" not in run(shared_bundle, shared_bundle, "--images", photos).stderr


def test_the_limit_takes_the_first_and_worst_none_shows_no_rows(shared_bundle: Path, other: Path, photos: Path) -> None:
    result = run(shared_bundle, other, "--images", photos, "--limit", 3, "--worst", 0)
    assert result.exit_code == 0
    assert "3: 3 scored by both" in result.stdout
    assert "furthest" not in result.stdout
    assert "2.png" not in result.stdout


def test_images_are_read_a_batch_at_a_time(shared_bundle: Path, photos: Path) -> None:
    taken, ahead = 0, []

    def entries() -> Iterator[Entry]:
        nonlocal taken
        for file in sorted(photos.iterdir()):
            taken += 1
            yield Entry(str(file), file)

    with Scorer.open(shared_bundle, backend="onnxruntime-cpu") as scorer:
        found = compare_bundles(scorer, scorer, entries(), batch_size=3, advance=lambda n: ahead.append((taken, n)))
    assert ahead == [(3, 3), (6, 3), (7, 1)]
    assert len(found.images) == 7
    assert len(found.seconds) == 3


def test_what_must_be_fetched_is_fetched_once(shared_bundle: Path, other: Path, photo: Photo) -> None:
    data, calls = photo("a.png").read_bytes(), 0

    def fetch() -> bytes:
        nonlocal calls
        calls += 1
        return data

    with Scorer.open(shared_bundle) as a, Scorer.open(other) as b:
        found = compare_bundles(a, b, [Entry("there", fetch)], batch_size=2)
    assert found.images == ["there"]
    assert calls == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--images", "nowhere.jpg"), "does not exist"),
        ((), "Missing option '--images'"),
        (("--images", ".", "-o", "nowhere/found.json"), "does not exist; create it"),
    ],
)
def test_bad_usage_gives_2(shared_bundle: Path, args: tuple[str, ...], message: str) -> None:
    result = run(shared_bundle, shared_bundle, *args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_reader_that_leaves_is_no_failure(shared_bundle: Path, photos: Path) -> None:
    program = "from mdnet_rt.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "compare",
        *map(str, (shared_bundle, shared_bundle, "--images", photos)),
        *OPTIONS,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 0
    assert "error" not in errors
    assert "Traceback" not in errors
