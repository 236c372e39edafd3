"""The feature cache: it keeps what the encoder gives, finds it by content, and computes anew what is damaged."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recorded import Recorded

from mdnet.data.rated import Rated
from mdnet.data.scut_fbp5500 import read_splits
from mdnet.model.config import preset
from mdnet.model.diffusion import DiffusionEncoder
from mdnet.model.net import MDNet, random_mdnet
from mdnet.training import features as module
from mdnet.training.features import cached_features, encoder_digest
from mdnet_engines.errors import MDNetError
from mdnet_rt.images.face_crop import face_finder
from mdnet_rt.images.preprocess import load_image


@pytest.fixture
def model() -> MDNet:
    return random_mdnet(preset("demo"), seed=0)


@pytest.fixture
def data(faces: Path) -> Rated:
    (split,) = read_splits(faces, "60-40")
    return split.train.take(np.arange(9))


class Counted:
    """An encoder that counts the images it has seen."""

    def __init__(self, encoder: DiffusionEncoder, monkeypatch: pytest.MonkeyPatch):
        self.images = 0
        inner = encoder.forward

        def forward(image: torch.Tensor) -> dict[str, torch.Tensor]:
            self.images += len(image)
            return inner(image)

        monkeypatch.setattr(encoder, "forward", forward)


def test_a_batch_is_what_the_encoder_gives_for_images_and_mirror_images(model: MDNet, data: Rated) -> None:
    rows, mirror = torch.tensor([7, 0, 3]), torch.tensor([1, 0, 1])
    pixels = torch.stack(
        [
            torch.from_numpy(load_image(data.images[row], 128)).flip([1] if side else [])
            for row, side in zip(rows.tolist(), mirror.tolist(), strict=True)
        ]
    )
    with cached_features(model.diffusion, model.config, data) as features:
        found, found_pixels, ratings = features.batch(rows, mirror)
    assert torch.equal(found_pixels, pixels)
    assert ratings.tolist() == data.ratings[rows.numpy()].tolist()
    for name, expected in model.diffusion(pixels).items():
        # Convolutions of another batch size may sum in another order.
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)


def test_a_second_run_computes_nothing_and_reads_the_same(
    model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, straight = torch.arange(len(data)), torch.zeros(len(data), dtype=torch.long)
    counted = Counted(model.diffusion, monkeypatch)
    with cached_features(model.diffusion, model.config, data, folder=tmp_path / "cache") as features:
        first, *_ = features.batch(every, straight)
    assert counted.images == 2 * len(data)
    reported = Recorded()
    with cached_features(model.diffusion, model.config, data, folder=tmp_path / "cache", progress=reported) as features:
        second, *_ = features.batch(every, straight)
    assert counted.images == 2 * len(data)
    _, (total, images) = reported.counts  # after those that are read
    assert total == sum(images) == len(data)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_was_killed_computes_only_what_is_missing(
    model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_IMAGES", 2)
    counted = Counted(model.diffusion, monkeypatch)

    def killed(_: str | int) -> None:
        if counted.images > 2 * 5:
            raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        cached_features(model.diffusion, model.config, data, folder=tmp_path, batch_size=1, progress=Recorded(killed)),
    ):
        pass
    assert not list(tmp_path.rglob("*.part"))
    counted.images = 0
    with cached_features(model.diffusion, model.config, data, folder=tmp_path, batch_size=1):
        assert counted.images == 2 * (len(data) - 4)  # two shards were whole; the fifth and sixth image were not


def test_images_are_found_by_what_is_in_them(
    model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cached_features(model.diffusion, model.config, data, folder=tmp_path / "cache"):
        pass
    counted = Counted(model.diffusion, monkeypatch)
    renamed = tmp_path / "CF1.jpg"
    shutil.copy(data.images[0], renamed)
    changed = tmp_path / "CF2.jpg"
    Image.open(data.images[0]).rotate(180).save(changed)
    twice = Rated([renamed, changed, changed], np.ones(3, np.float32))
    with cached_features(model.diffusion, model.config, twice, folder=tmp_path / "cache") as features:
        assert counted.images == 2  # one new picture, and its mirror image
        maps, *_ = features.batch(torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert torch.equal(maps["mid_s64"][0], maps["mid_s64"][1])


def test_another_encoder_size_or_type_has_its_own_features(model: MDNet, data: Rated, tmp_path: Path) -> None:
    other = random_mdnet(preset("demo"), seed=1)
    assert encoder_digest(model.diffusion) != encoder_digest(other.diffusion)
    assert encoder_digest(model.diffusion) == encoder_digest(random_mdnet(preset("demo"), seed=0).diffusion)
    for encoder, half in ((model.diffusion, False), (other.diffusion, False), (other.diffusion, True)):
        with cached_features(encoder, model.config, data, folder=tmp_path, half=half):
            pass
    assert len(list(tmp_path.iterdir())) == 3


def test_half_features_are_rounded_and_take_half_the_disk(model: MDNet, data: Rated, tmp_path: Path) -> None:
    rows, straight = torch.arange(4), torch.zeros(4, dtype=torch.long)
    sizes, maps = [], []
    for half in (False, True):
        folder = tmp_path / str(half)
        with cached_features(model.diffusion, model.config, data, folder=folder, half=half) as features:
            maps.append(features.batch(rows, straight)[0])
        sizes.append(sum(file.stat().st_size for file in folder.rglob("*.safetensors")))
    assert sizes[1] < 0.55 * sizes[0]
    for name in maps[0]:
        assert maps[1][name].dtype == torch.float32
        torch.testing.assert_close(maps[1][name], maps[0][name].half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["cut off", "random bytes", "empty", "another program's", "another shape"])
def test_a_damaged_shard_is_computed_anew(
    damage: str, model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cached_features(model.diffusion, model.config, data, folder=tmp_path):
        pass
    (shard,) = tmp_path.rglob("*.safetensors")
    whole = shard.read_bytes()
    if damage == "another program's":
        module.save_file({"down_s16": torch.zeros(2)}, shard)
    elif damage == "another shape":
        images, tensors = module._open_shard(shard, model.config.feature_shapes)
        shrunk = {name: tensor[:, :, :1].contiguous() for name, tensor in tensors.items()}
        module.save_file(shrunk, shard, {"mdnet_images": module.json.dumps(images)})
    else:
        shard.unlink()
        shard.write_bytes({"cut off": whole[: len(whole) // 2], "random bytes": bytes(range(256)) * 9}.get(damage, b""))
    counted = Counted(model.diffusion, monkeypatch)
    with cached_features(model.diffusion, model.config, data, folder=tmp_path) as features:
        assert counted.images == 2 * len(data)
        maps, *_ = features.batch(torch.tensor([0]), torch.tensor([0]))
    assert maps["down_s16"].shape == (1, *model.config.feature_shapes["down_s16"])


def test_a_disk_that_is_too_small_is_said_before_the_work(
    model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(model.diffusion, monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with (
        pytest.raises(MDNetError, match=r"9 images take 0\.0 GB.*--cache.*--half-features"),
        cached_features(model.diffusion, model.config, data, folder=tmp_path),
    ):
        pass
    assert counted.images == 0


def test_features_that_float16_can_not_hold_are_refused(
    model: MDNet, data: Rated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = model.diffusion.forward
    monkeypatch.setattr(
        model.diffusion, "forward", lambda image: {name: 1e6 + value for name, value in inner(image).items()}
    )
    with (
        pytest.raises(MDNetError, match=r"not finite in torch\.float16; leave out --half-features"),
        cached_features(model.diffusion, model.config, data, folder=tmp_path, half=True),
    ):
        pass
    assert not list(tmp_path.rglob("*.safetensors"))


def test_training_sees_the_framing_of_the_configuration(model: MDNet, portraits: Path) -> None:
    data = read_splits(portraits, "60-40")[0].train.take(np.arange(3))
    config = dataclasses.replace(model.config, face=1.2)
    with cached_features(model.diffusion, config, data) as features:
        for file, pixels in zip(data.images, features.pixels, strict=True):
            np.testing.assert_array_equal(pixels, load_image(file, 128, find_box=face_finder(1.2)))


def test_a_training_image_without_a_face_is_named(model: MDNet, tmp_path: Path) -> None:
    blank = tmp_path / "AF1.jpg"
    Image.new("RGB", (90, 90)).save(blank)
    config = dataclasses.replace(model.config, face=1.2)
    with (
        pytest.raises(MDNetError, match=r"AF1\.jpg: no face found; every image of the split is needed"),
        cached_features(model.diffusion, config, Rated([blank], np.ones(1, np.float32))),
    ):
        pass


def test_an_image_that_can_not_be_read_is_named(model: MDNet, tmp_path: Path) -> None:
    broken = tmp_path / "AF1.jpg"
    broken.write_bytes(b"no picture")
    with (
        pytest.raises(MDNetError, match=r"AF1\.jpg: .*every image of the split is needed"),
        cached_features(model.diffusion, model.config, Rated([broken], np.ones(1, np.float32))),
    ):
        pass
