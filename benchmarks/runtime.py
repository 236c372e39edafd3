"""What the runtime adds to the graphs' own time, memory and start: python benchmarks/runtime.py [PART ...]

| part | what is compared |
| --- | --- |
| `small` | rows of 350×350 JPEG files (`Scorer.stream`) against the graphs alone on the same images; full-size int8 |
| `large` | the same with 12-megapixel JPEG files |
| `memory` | peak memory of `mdnet-rt score` on 1,000 files and on `--files` (100,000) of them, demo bundle |
| `serve` | `mdnet-rt serve` under `--clients` (64) for `--seconds` (60) against `mdnet-rt score`; SIGTERM under load |
| `start` | `mdnet-rt score` of one image, process start included, demo bundle |

Both sides of a ratio take turns, and it is the median over `--rounds`. Files are hard links of a few images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mdnet_rt import Scorer
from mdnet_rt.images.preprocess import load_image

EXPORT = [sys.executable, "-c", "from mdnet_export.cli.main import main; main()"]
RUNTIME = [sys.executable, "-m", "mdnet_rt.cli.main"]
LOAD = [sys.executable, Path(__file__).with_name("serve_load.py")]
_SMALL_PARENT = """
import os, pathlib, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
pathlib.Path(sys.argv[1]).write_text(str(usage.ru_maxrss))
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process's peak memory begins with what its parent had at the fork, which here is a whole model."""
DIFFERENT = 24
"""Images that are unlike each other; the rest are links to them."""


def main() -> None:
    """Measure the parts that are asked for, print, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--full", type=Path, help="bundle of full-size cost (sd15-vim-s, int8; built when missing)")
    parser.add_argument("--demo", type=Path, help="demo bundle (int8; built when missing)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, help="images a round of `small` and `large`")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        figures = {}
        for name in options.parts or PARTS:
            figures[name] = PARTS[name](options)
            print(f"{name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in figures[name].items()), flush=True)
    if options.output:
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {package: version(package) for package in ("onnxruntime", "pillow", "numpy")},
        }
        options.output.write_text(json.dumps({**facts, **figures}, indent=1) + "\n")


def small(options: argparse.Namespace) -> dict[str, float]:
    """Rows of small files against the graphs alone."""
    return _against_graphs(options, (350, 350))


def large(options: argparse.Namespace) -> dict[str, float]:
    """Rows of 12-megapixel files against the graphs alone."""
    return _against_graphs(options, (4000, 3000))


def memory(options: argparse.Namespace) -> dict[str, float]:
    """Peak memory of few files and of many."""
    peaks = {}
    for count in (1000, options.files):
        folder = _files(options, (350, 350), count)
        command = [*RUNTIME, "score", folder, "--bundle", _demo(options), "-o", options.scratch / "rows.csv"]
        peaks[count] = _run(command, options)[1]
        with (options.scratch / "rows.csv").open("rb") as rows:
            if (found := sum(1 for _ in rows) - 1) != count:
                sys.exit(f"error: {found} rows of {count} images")
    few, many = peaks.values()
    return {"few": 1000, "many": options.files, "few_mib": few, "many_mib": many, "ratio": many / few}


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Throughput and latency of the server, and that it drains."""
    folder = _files(options, (350, 350), DIFFERENT)
    many = _files(options, (350, 350), 2000)
    score = [*RUNTIME, "score", many, "--bundle", _demo(options), "-o", options.scratch / "rows.csv"]
    rates, loads = [], []
    with _server(options) as (address, _):
        for _ in range(options.rounds):
            rates.append(_rate(_run(score, options)[2]))
            loads.append(_load(address, folder, options))
    for load, rate in zip(loads, rates, strict=True):
        load["score_per_second"] = rate
        load["of_score"] = load["images_per_second"] / rate
        load["p99_over_p50"] = load["p99_ms"] / load["p50_ms"]
    middle = sorted(loads, key=lambda load: load["of_score"])[len(loads) // 2]
    return {**middle, "errors_in_all_rounds": sum(load["errors"] for load in loads), **_drained(options, folder)}


def start(options: argparse.Namespace) -> dict[str, float]:
    """A whole process that scores one image."""
    image = next(_files(options, (350, 350), DIFFERENT).iterdir())
    command = [*RUNTIME, "score", image, "--bundle", _demo(options)]
    _run(command, options)
    seconds = [_run(command, options)[0] for _ in range(max(5, options.rounds))]
    return {"median_s": statistics.median(seconds), "slowest_s": max(seconds)}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "small": small,
    "large": large,
    "memory": memory,
    "serve": serve,
    "start": start,
}


def _against_graphs(options: argparse.Namespace, size: tuple[int, int]) -> dict[str, float]:
    files = sorted(_files(options, size, options.images).iterdir())
    with Scorer.open(_full(options), backend=options.backend, batch_size=options.batch_size) as scorer:
        pixels = np.stack([load_image(file, scorer.image_size) for file in files])

        def graphs() -> None:
            for first in range(0, len(pixels), options.batch_size):
                scorer.score_batch(pixels[first : first + options.batch_size])

        def rows() -> None:
            if bad := [row for row in scorer.stream(files) if not row.ok]:
                sys.exit(f"error: {bad[0]}")

        graphs()
        pairs = [(_seconds(graphs), _seconds(rows)) for _ in range(options.rounds)]
    alone, whole = zip(*pairs, strict=True)
    return {
        "graphs_per_s": len(files) / statistics.median(alone),
        "rows_per_s": len(files) / statistics.median(whole),
        "ratio": statistics.median(a / w for a, w in pairs),
    }


@contextmanager
def _server(options: argparse.Namespace) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [*RUNTIME, "serve", _demo(options), "--port", "0", "--backend", options.backend]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://[\w.]+:\d+", line):
                yield found[0], process
                break
        else:
            sys.exit("error: the server did not start")
    finally:
        process.terminate()
        process.wait(timeout=60)


def _load(address: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [*LOAD, address, folder, "--clients", options.clients, "--seconds", options.seconds]
    return json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE).stdout)


def _drained(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """What becomes of requests when the server is told to end in the middle of a load."""
    with _server(options) as (address, process):
        command = [*LOAD, address, folder, "--clients", options.clients, "--seconds", 8]
        load = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        time.sleep(5)
        process.send_signal(signal.SIGTERM)
        statuses = json.loads(load.communicate()[0])["statuses"]
        code = process.wait(timeout=60)
    return {"sigterm_answered": statuses.get("200", 0), "sigterm_lost": statuses.get("lost", 0), "sigterm_exit": code}


def _run(command: list[Any], options: argparse.Namespace) -> tuple[float, float, str]:
    """Seconds, peak MiB and standard error of a process that ends well."""
    errors, peak = options.scratch / "stderr", options.scratch / "peak"
    begin = time.perf_counter()
    with errors.open("wb") as stream:
        command = [sys.executable, "-c", _SMALL_PARENT, peak, *command]
        code = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stream).returncode
    seconds = time.perf_counter() - begin
    text = errors.read_text()
    if code:
        sys.exit(f"error: {text}")
    return seconds, int(peak.read_text()) / (2**20 if sys.platform == "darwin" else 2**10), text


def _rate(summary: str) -> float:
    found = re.search(r"([\d.]+) images/s", summary)
    assert found, summary
    return float(found[1])


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _files(options: argparse.Namespace, size: tuple[int, int], count: int) -> Path:
    """A folder of `count` JPEG files, made once."""
    folder = options.scratch / f"{size[0]}x{size[1]}-{count}"
    if folder.exists():
        return folder
    originals = options.scratch / f"{size[0]}x{size[1]}"
    if not originals.exists():
        originals.mkdir()
        for seed in range(DIFFERENT if size[0] < 1000 else 4):
            _photo(seed, size).save(originals / f"{seed}.jpg", quality=90)
    folder.mkdir()
    for i, original in zip(range(count), itertools.cycle(sorted(originals.iterdir()))):
        (folder / f"face{i}.jpg").hardlink_to(original)
    return folder


def _photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Something with as much detail as a photograph: a JPEG of it is about as large."""
    random = np.random.default_rng(seed)
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for detail, weight in ((8, 90), (40, 40), (160, 16)):
        noise = random.integers(0, 256, (detail, detail, 3), np.uint8)
        picture += weight / 128 * (np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) - 127.5)
    return Image.fromarray((picture + 127.5).clip(0, 255).astype(np.uint8))


def _full(options: argparse.Namespace) -> Path:
    more = ["--preset", "sd15-vim-s", "--random-init", "--force", "--num-images", "2", "--num-calib", "8"]
    return _bundle(options, options.full, "full", more)


def _demo(options: argparse.Namespace) -> Path:
    return _bundle(options, options.demo, "demo", [])


def _bundle(options: argparse.Namespace, named: Path | None, name: str, more: list[str]) -> Path:
    bundle = named or options.scratch / name
    if not (bundle / "manifest.json").is_file():
        subprocess.run(
            [*EXPORT, "build", "--precision", "int8", "-o", str(bundle), *more], check=True, stdout=sys.stderr
        )
    return bundle


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
