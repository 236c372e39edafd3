"""`mdnet-rt score --executor ray` gives what one process gives: on a local Ray of two CPUs, with two actors."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from mdnet_engines.errors import MDNetError
from mdnet_rt.cli.main import main
from mdnet_rt.cluster.ray_executor import Part, Pool, _checked, choose_pool, ray_executor
from mdnet_rt.rows.result import Result as Row
from mdnet_rt.scoring.run import Settings, local_executor
from mdnet_rt.sources.locations import find_locations

ray = pytest.importorskip("ray")

Photo = Callable[..., Path]
RAY = ("--executor", "ray", "--ray-actors", "2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["score", *map(str, args)])


@pytest.fixture
def folder(photo: Photo, tmp_path: Path) -> Path:
    """Images for several shards of two, good and bad, and archives between them."""
    for seed in range(20):
        photo(f"in/img{seed}.png", seed=seed)
    images = [file.read_bytes() for file in sorted((tmp_path / "in").iterdir())]
    (tmp_path / "in" / "img3.png").write_text("not an image")
    (tmp_path / "in" / os.fsdecode(b"img\xe9.png")).write_bytes(images[4])
    (tmp_path / "in" / "gone.jpg").symlink_to("nothing")
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number in range(5):
            archive.add(tmp_path / "in" / f"img{number}.png", f"{number}.png")
    pq.write_table(pa.table({"image": images[:5], "other": images[:5]}), tmp_path / "table.parquet")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "shard.tar").read_bytes()[:3000])
    return tmp_path


def inputs(folder: Path) -> list[Path]:
    return [folder / "cut.tar", folder / "in", folder / "shard.tar", folder / "table.parquet"]


@pytest.mark.usefixtures("cluster")
def test_the_file_is_the_one_that_the_local_executor_writes(
    shared_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # actors find relative paths too
    args = [*(file.relative_to(folder) for file in inputs(folder)), "--bundle", shared_bundle, "--batch-size", 1]
    assert run(*args, "-o", "local.jsonl").exit_code == 1
    result = run(*args, "-o", "ray.jsonl", *RAY)
    assert result.exit_code == 1
    assert Path("ray.jsonl").read_bytes() == Path("local.jsonl").read_bytes()
    assert result.stdout == ""
    ray_line, summary = result.stderr.splitlines()
    assert ray_line == "ray: the Ray that is connected, 2 actors of 1 CPU"
    assert summary.startswith("33 images: ")


@pytest.mark.usefixtures("cluster")
def test_pixels_come_with_the_rows_where_asked_for(shared_bundle: Path, folder: Path) -> None:
    settings = Settings(shared_bundle, batch_size=3, keep_pixels=True)
    locations = list(find_locations(inputs(folder)))
    with local_executor(settings) as local, ray_executor(settings) as remote:
        pairs = zip(local.rows(locations, iter(()), None), remote.rows(locations, iter(()), None), strict=True)
        for expected, row in pairs:
            assert row == expected
            assert (row.pixels is None) == (expected.pixels is None)
            assert row.pixels is None or np.array_equal(row.pixels, expected.pixels)


@pytest.mark.usefixtures("cluster")
def test_a_run_that_is_told_to_stop_ends_early_and_leaves_the_actors_place_to_the_next(
    shared_bundle: Path, photo: Photo
) -> None:
    stop = threading.Event()
    image = os.fspath(photo("a.png"))
    with ray_executor(Settings(shared_bundle, batch_size=1), actors=2) as executor:
        rows = executor.rows([image] * 1000, iter(()), stop)
        assert len(list(islice(rows, 5))) == 5
        stop.set()
        assert len(list(rows)) < 900
        assert len(list(executor.rows([image] * 5, iter(()), None))) == 5


@pytest.mark.usefixtures("cluster")
def test_changed_inputs_are_resumed_as_the_local_executor_does(shared_bundle: Path, folder: Path) -> None:
    args = [*inputs(folder), "--bundle", shared_bundle, "--batch-size", 2]
    assert run(*args, "-o", folder / "whole.csv").exit_code == 1
    lines = (folder / "whole.csv").read_bytes().splitlines(keepends=True)
    for name in ("local.csv", "ray.csv"):  # as a killed run leaves them: within the archive, and a row that is cut
        (folder / f"{name}.partial").write_bytes(b"".join(lines[:26]) + lines[26][:9])
    (folder / "in" / "img7.png").unlink()
    (folder / "in" / "img2b.png").write_bytes((folder / "in" / "img1.png").read_bytes())
    with tarfile.open(folder / "shard.tar", "a") as archive:
        archive.add(folder / "in" / "img9.png", "new.png")
    assert run(*args, "-o", folder / "local.csv", "--resume").exit_code == 1
    assert run(*args, "-o", folder / "ray.csv", "--resume", *RAY).exit_code == 1
    resumed = (folder / "ray.csv").read_bytes()
    assert resumed == (folder / "local.csv").read_bytes()
    assert resumed.count(b"img2b.png") == resumed.count(b"shard.tar::new.png") == 1


@pytest.mark.usefixtures("cluster")
def test_a_killed_run_is_resumed_with_nothing_lost_or_repeated(
    shared_bundle: Path, photo: Photo, tmp_path: Path
) -> None:
    """The killed process has a Ray of its own, which also is where its two streams are looked at."""
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{photo(f'{seed % 7}.png', seed=seed % 7)}\n" for seed in range(2000)))
    args = ["--list", names, "--bundle", shared_bundle, "--batch-size", 4]
    partial = tmp_path / "ray.csv.partial"
    command = [sys.executable, "-m", "mdnet_rt.cli.main", "score", *args, "-o", tmp_path / "ray.csv", *RAY]
    with subprocess.Popen(
        [*map(str, command), "--ray-address", "local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.read_bytes().count(b"\n") > 50):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
    assert out == b""
    assert err.decode().splitlines()[0].startswith("ray: a new Ray on this machine, 2 actors of ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "ray.csv").exists()

    assert run(*args, "-o", tmp_path / "local.csv").exit_code == 0
    assert run(*args, "-o", tmp_path / "ray.csv", "--resume", *RAY).exit_code == 0
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()


def fails_on_single_images(fusion: onnx.ModelProto) -> onnx.ModelProto:
    """The graph, with a second image's score looked up, to no effect where there is one."""
    fusion.graph.node[-1].output[0] = "raw"
    fusion.graph.node.extend(
        [
            helper.make_node("Gather", ["raw", "second"], ["other"]),
            helper.make_node("Mul", ["other", "nothing"], ["zero"]),
            helper.make_node("Add", ["raw", "zero"], ["score"]),
        ]
    )
    constants = {"second": np.int64(1), "nothing": np.float32(0)}
    fusion.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return fusion


@pytest.mark.usefixtures("cluster")
def test_what_ends_an_actors_work_ends_the_run_after_the_rows_before_it(
    make_bundle: Callable[..., Path], graphs: dict[str, Callable[..., onnx.ModelProto]], folder: Path
) -> None:
    bundle = make_bundle(folder / "bundle", fusion=fails_on_single_images(graphs["fusion"]()))
    images = sorted((folder / "in").glob("img1*.png"))[:9]
    args = [*images, "--bundle", bundle, "--batch-size", 4, "--backend", "onnxruntime-cpu"]
    local = run(*args, "-o", folder / "scores.csv")
    rows = (folder / "scores.csv.partial").read_bytes()
    (folder / "scores.csv.partial").unlink()
    result = run(*args, "-o", folder / "scores.csv", *RAY)
    assert result.exit_code == local.exit_code == 1
    assert result.stderr.splitlines()[1:] == local.stderr.splitlines()
    assert "ONNX Runtime failed" in local.stderr
    assert "the 8 rows so far" in local.stderr
    assert (folder / "scores.csv.partial").read_bytes() == rows


@pytest.mark.usefixtures("cluster")
def test_a_bundle_that_an_actor_cannot_open_is_one_line_that_names_the_node(shared_bundle: Path, photo: Photo) -> None:
    result = run(photo("a.png"), "--bundle", shared_bundle, "--backend", "onnxruntime-cuda", "--executor", "ray")
    assert result.exit_code == 1
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: node ")
    assert "onnxruntime-cuda needs CUDAExecutionProvider" in line
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("nodes", "backend", "actors", "pool"),
    [
        ([{"CPU": 2.0}], "auto", None, Pool(1, cpus=2)),
        ([{"CPU": 2.0}], "auto", 2, Pool(2, cpus=1)),
        ([{"CPU": 16.0}, {"CPU": 10.0}], "auto", None, Pool(6, cpus=4)),
        ([{"CPU": 16.0}, {"CPU": 2.0}], "openvino", 5, Pool(5, cpus=2)),
        ([{"CPU": 2.0}], "auto", 9, Pool(9, cpus=1)),
        ([{"CPU": 0.0, "memory": 1e9}], "auto", None, Pool(1, cpus=1)),
        ([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], "auto", None, Pool(4, cpus=1, gpus=1)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 2.0}], "tensorrt", None, Pool(6, cpus=1, gpus=1)),
        ([{"CPU": 8.0, "GPU": 4.0}], "tensorrt", 2, Pool(2, cpus=1, gpus=1)),
        ([{"CPU": 8.0, "GPU": 4.0}], "onnxruntime-cpu", None, Pool(2, cpus=4)),
    ],
)
def test_an_actor_has_a_gpu_where_there_are_any_and_the_backend_can_use_it(
    nodes: list[dict[str, float]], backend: str, actors: int | None, pool: Pool
) -> None:
    assert choose_pool(nodes, backend, actors) == pool


@pytest.mark.parametrize(
    "parts",
    [
        [(0, 0, False), (0, 0, False), (0, 1, True), (1, 0, True)],  # repeated
        [(0, 1, True), (1, 0, True)],  # the first is missing
        [(0, 0, False), (1, 0, True)],  # the end of a shard
        [(0, 0, True)],  # a shard
        [(1, 0, True), (0, 0, True)],  # order
    ],
)
def test_rows_that_come_twice_or_not_at_all_end_the_run(parts: list[tuple[int, int, bool]]) -> None:
    received = [Part(shard, number, [Row("a", 3.0)], last=last) for shard, number, last in parts]
    with pytest.raises(MDNetError, match="Ray gave"):
        list(_checked(received, 2))


def test_a_missing_ray_is_one_line(shared_bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "ray" else find(name, *args))
    result = run(photo("a.png"), "--bundle", shared_bundle, "--executor", "ray")
    assert result.exit_code == 1
    assert result.stderr == "error: ray is not installed; it comes with the extra mdnet[ray]\n"


def test_options_about_ray_need_the_executor(shared_bundle: Path, photo: Photo) -> None:
    result = run(photo("a.png"), "--bundle", shared_bundle, "--ray-actors", 2)
    assert result.exit_code == 2
    assert "--executor ray" in result.stderr
