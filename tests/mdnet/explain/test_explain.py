"""`mdnet explain`: a page for a checkpoint and for a bundle; pictures that can't be read are skipped and named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pages import Page, loads_nothing
from recorded import Recorded

from mdnet.cli.main import main
from mdnet.data.pictures import find_images
from mdnet.evaluation.scored_model import open_model
from mdnet.explain.explain import Explained, Explanation, explain
from mdnet.explain.occlusion import Occlusion
from mdnet.explain.page import render_page
from mdnet.model.checkpoint import demo_checkpoint, save_checkpoint
from mdnet.model.config import preset
from mdnet.model.net import random_mdnet
from mdnet_engines.bundle.files import Bundle
from mdnet_engines.errors import MDNetError, UsageError

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
COARSE = ("--patch", "32", "--stride", "32")  # 17 scores a picture


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def test_a_checkpoint_gives_occlusion_attention_and_their_agreement(tmp_path: Path) -> None:
    page, maps = tmp_path / "page.html", tmp_path / "maps.json"
    files = [EXAMPLES / "face-1.jpg", EXAMPLES / "face-2.jpg"]
    done = run(demo_checkpoint(), *files, *COARSE, "-o", page, "--json", maps)
    assert done.exit_code == 0, done.output
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == list(map(str, files))
    html = page.read_text(encoding="utf-8")
    loads_nothing(html)
    document = json.loads(maps.read_text(encoding="utf-8"))
    for image, line in zip(document["images"], done.stdout.splitlines(), strict=True):
        assert np.shape(image["occlusion"]) == (4, 4)
        for reading in ("own", "traced"):
            cells = {name: np.shape(each) for name, each in image["attention"][reading].items()}
            assert cells == {"down_s16": (8, 8), "down_s32": (4, 4), "mid_s64": (2, 2)}
            assert sum(np.sum(each) for each in image["attention"][reading].values()) == pytest.approx(1, abs=1e-5)
        assert line.endswith(f"attention agrees {image['agreement']['traced']:.2f}")
    mean = np.mean([image["agreement"]["traced"] for image in document["images"]])
    assert f"rank correlation {mean:.2f}".replace("-", "−") in Page(html).text
    # A picture itself, its occlusion, and for two readings the whole and three scales.
    assert Page(html).tags().count("img") == 2 * (2 + 2 * 4)


def test_a_bundle_gives_the_same_occlusion_without_torch(demo_bundle: Bundle, tmp_path: Path) -> None:
    page, maps, theirs = tmp_path / "page.html", tmp_path / "maps.json", tmp_path / "theirs.json"
    missing = ("torch", "diffusers", "safetensors")
    program = f"import sys; sys.modules.update(dict.fromkeys({missing})); from mdnet.cli.main import main; main()"
    picture = EXAMPLES / "face-3.jpg"
    arguments = [demo_bundle.path, picture, *COARSE, "-o", page, "--json", maps]
    done = subprocess.run(
        [sys.executable, "-c", program, "explain", *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "give the checkpoint" in done.stderr
    text = Page(page.read_text(encoding="utf-8")).text
    assert "There is no attention on this page" in text
    assert run(demo_checkpoint(), picture, *COARSE, "-o", page, "--json", theirs).exit_code == 0
    (bundle,), (checkpoint,) = (json.loads(file.read_text())["images"] for file in (maps, theirs))
    # A score of the fp32 graphs is up to 1.2e-4 from PyTorch's; a loss is a difference of two.
    np.testing.assert_allclose(bundle["occlusion"], checkpoint["occlusion"], atol=5e-4)
    assert np.ptp(checkpoint["occlusion"]) > 0.02
    assert (bundle["attention"], bundle["agreement"]) == ({}, {})


@pytest.mark.parametrize("fusion", ["concatenation", "vim-only"])
def test_a_checkpoint_without_attention_gives_occlusion_and_the_reason(fusion: str, tmp_path: Path) -> None:
    model = random_mdnet(dataclasses.replace(preset("demo"), fusion=fusion), seed=0)
    save_checkpoint(model, tmp_path / "model.safetensors")
    found = explain(open_model(tmp_path / "model.safetensors"), [EXAMPLES / "face-1.jpg"], patch=64, stride=64)
    assert fusion in str(found.without_attention)
    assert found.images[0].looked is None
    assert fusion in Page(render_page(found, facts={})).text


def test_pictures_that_cannot_be_read_are_skipped_named_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    shutil.copy(EXAMPLES / "face-1.jpg", folder / "more" / "b.jpg")
    (folder / "<a>.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not an image by its name")
    page = tmp_path / "page.html"
    done = run(demo_checkpoint(), folder, *COARSE, "-o", page)
    assert done.exit_code == 1
    assert f"skipped {folder / '<a>.jpg'}: not an image" in done.stderr
    assert done.stdout.startswith(f"{folder / 'more' / 'b.jpg'}: ")
    shown = Page(page.read_text(encoding="utf-8"))
    assert shown.tables["skipped"][1][0] == str(folder / "<a>.jpg")
    assert "a" not in shown.tags()  # the name is text


def test_more_images_than_the_limit_are_left_out_with_a_note(tmp_path: Path) -> None:
    done = run(demo_checkpoint(), EXAMPLES, *COARSE, "--limit", 1, "-o", tmp_path / "page.html")
    assert done.exit_code == 0
    assert "8 images; the first 1 are explained (--limit)" in done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere.jpg", "-o", "p.html"], "nowhere.jpg: no such file or folder"),
        (["empty", "-o", "p.html"], "empty: no images in this folder"),
        (["face.jpg", "-o", "missing/p.html"], "-o takes a file in a folder that exists, to write the page to"),
        (["face.jpg", "-o", "p.html", "--patch", "200"], "a patch of 200 pixels; expected 1 to 128"),
        (["face.jpg", "-o", "p.html", "--stride", "99"], "a stride of 99 pixels; expected 1 to 16, the patch"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(EXAMPLES / "face-1.jpg", "face.jpg")
    done = run(demo_checkpoint(), *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert reason in done.stderr.splitlines()[-1]
    assert not (tmp_path / "p.html").exists()


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(MDNetError, match="none of 1 pictures could be read"):
        explain(open_model(demo_checkpoint()), [tmp_path / "a.jpg"])


def test_every_score_is_counted_and_a_folder_is_in_order(tmp_path: Path) -> None:
    progress, files = Recorded(), find_images([EXAMPLES])
    assert files == sorted(files)
    assert len(files) == 8
    explain(open_model(demo_checkpoint()), files[:2], patch=64, stride=64, batch_size=3, progress=progress)
    assert progress.counts == [(10, [1, 3, 1, 1, 3, 1])]
    with pytest.raises(UsageError, match="no images in this folder"):
        find_images([tmp_path])


def explanation(looks: list[np.ndarray], losses: list[np.ndarray]) -> Explanation:
    """Pictures whose attention (own and traced alike) and losses are given, on one scale."""
    from mdnet.explain.attention import Looked

    images = [
        Explained(
            f"{n}.jpg",
            np.zeros((8, 8, 3), np.uint8),
            Occlusion(3.0, loss, loss.repeat(2, 0).repeat(2, 1)),
            Looked(3.0, {"scale": look}, {"scale": look}),
        )
        for n, (look, loss) in enumerate(zip(looks, losses, strict=True))
    ]
    return Explanation(open_model(demo_checkpoint()), 2, 2, images, [], None, 0.1)


def test_agreement_is_beside_that_with_another_pictures_attention() -> None:
    looks = [np.arange(1.0, 17).reshape(4, 4), np.arange(16.0, 0, -1).reshape(4, 4)]
    found = explanation(looks, [look / 100 for look in looks])
    assert found.agreement("traced") == pytest.approx((1, -1))
    text = " ".join(Page(render_page(found, facts={})).text.split())
    assert "rank correlation 1.00" in text
    assert "With another picture's attention it is −1.00" in text
    alike = explanation(looks[:1], [np.zeros((4, 4))])
    assert np.isnan(alike.agreement("own")).all()
    assert "rank correlation –" in Page(render_page(alike, facts={})).text


def test_names_and_facts_are_shown_as_text() -> None:
    found = explanation([np.ones((4, 4))], [np.eye(4)])
    hostile = dataclasses.replace(
        found, images=[dataclasses.replace(found.images[0], name="<script>x</script>\udcff.jpg")]
    )
    html = render_page(hostile, facts={"command": "<i>"})
    loads_nothing(html)
    page = Page(html)
    assert "<script>x</script>\\udcff.jpg" in page.text
    assert "script" not in page.tags()
    assert page.tags().count("i") == 1  # the legend's own
