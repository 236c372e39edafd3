"""Everything that takes a GPU to prove, in one command of nine minutes: python benchmarks/gpu_check.py

Stages stand alone, each in a process of its own and within its time; what is missing is a row "not installed". Every
row is written as soon as it is known, to benchmarks/results/<gpu>-<date>.json.

run       run the stages (the default)
render    make the tables of docs/gpu.md and README's line from the newest results
bundles   before: build the bundles that the stages run, into DIR; needs no GPU
kit       before: pack bundles and wheels for a machine without a package index, into DIR

docs/gpu.md says what each stage does and what counts as verified.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu.check import BUDGET, STAGES, Setting, Stage, run_stages
from gpu.checkout import ROOT, import_paths
from gpu.render import render
from gpu.results import BAD, ResultError, Results
from gpu.sizes import SIZES

RESULTS = ROOT / "benchmarks" / "results"
BUNDLES = ROOT / "build" / "gpu-bundles"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PACKAGES = (
    *("torch", "triton", "diffusers", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu"),
    *("tensorrt", "tensorrt-rtx", "mamba-ssm"),
)


def main() -> None:
    """Do what the command says; exit 1 where a stage that ran failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["run", "render", "bundles", "kit"], default="run")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="of bundles and kit, to be written")
    parser.add_argument("--dry-run", action="store_true", help="try the script itself, on the CPU and in small")
    parser.add_argument("--only", action="append", metavar="STAGE", help=f"of: {', '.join(s.name for s in STAGES)}")
    parser.add_argument("--bundles", type=Path, default=BUNDLES, help="folder that `bundles` wrote (%(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="for everything (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="file of the results, in place of benchmarks/results")
    kit = parser.add_argument_group("kit")
    kit.add_argument("--python", default="3.12", metavar="X.Y", help="of the other machine (%(default)s)")
    kit.add_argument("--wheel", action="append", type=Path, default=[], help="a file to add, such as TensorRT's own")
    options = parser.parse_args()
    if (options.command in ("bundles", "kit")) != (options.folder is not None):
        parser.error(f"{options.command} takes {'no' if options.folder else 'a'} folder")
    if options.command == "render":
        sys.exit(_render())
    sys.path += import_paths()
    if options.command == "bundles":
        sys.exit(_bundles(options.folder))
    if options.command == "kit":
        sys.exit(_kit(options))
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in options.only or () if name not in known]:
        parser.error(f"--only {unknown[0]}: there are: {', '.join(known)}")
    if options.budget <= 0:
        parser.error(f"--budget is {options.budget}; expected seconds")
    if options.dry_run and options.output is None:
        parser.error("--dry-run needs -o: it is no evidence, and not for benchmarks/results")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"-o {options.output}: there is no folder {options.output.parent}")
    stages = [stage for stage in STAGES if stage.name in (options.only or known)]
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    results, output = run(options, stages)
    _print(results, output)
    sys.exit(0 if results.passed else 1)


def run(options: argparse.Namespace, stages: list[Stage]) -> tuple[Results, Path]:
    """Run the stages; gives their results and the file that has them."""
    with tempfile.TemporaryDirectory(prefix="mdnet-gpu-check-", ignore_cleanup_errors=True) as name:
        scratch, bundles, paths = Path(name), options.bundles.resolve(), import_paths()
        device, sizes = ("cpu", "tiny") if options.dry_run else ("cuda", "full")
        begin = Results(
            gpu=f"none ({platform.machine()} CPU)" if options.dry_run else _gpu(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            dry_run=options.dry_run,
            command=shlex.join(["python", "benchmarks/gpu_check.py", *_told(sys.argv[1:])]),
            versions=_versions(),
        )
        output = (options.output or unused(RESULTS / f"{_slug(begin.gpu)}-{begin.day}.json")).resolve()
        if options.dry_run and options.bundles == BUNDLES:
            bundles = scratch / "bundles"
        setting = Setting(device, sizes, scratch, bundles, tuple(paths))
        if options.dry_run and any("pydantic" in stage.needs for stage in stages):
            _build_tiny(setting)
        return run_stages(stages, setting, begin, output, budget=options.budget, tell=_tell), output


def _build_tiny(setting: Setting) -> None:
    try:
        from gpu.bundles import BuildError, make
    except ModuleNotFoundError:  # the stages that need it say so
        return
    try:
        make(SIZES[setting.sizes], setting.bundles, setting.environment(), _tell)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)


def unused(file: Path) -> Path:
    """`file`, or that name with a number where it is taken: no run overwrites another's."""
    others = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in itertools.count(2))
    return next(each for each in itertools.chain([file], others) if not each.exists())


def _stop(number: int, _frame: object) -> None:
    for each in _SIGNALS:  # a second one must not stop the saving
        signal.signal(each, signal.SIG_IGN)
    print("stopping; what has been proven is kept", file=sys.stderr)
    sys.exit(128 + number)


def _bundles(folder: Path) -> int:
    try:
        from gpu.bundles import BuildError, make
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing; pip install -c constraints.txt -e '.[cpu,export]'", file=sys.stderr)
        return 1
    environment = Setting("cpu", "full", folder, folder, tuple(import_paths())).environment()
    try:
        make(SIZES["full"], folder.resolve(), environment, _say)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _kit(options: argparse.Namespace) -> int:
    from gpu.kit import KitError, download, write

    if not options.bundles.is_dir():
        print(f"error: there are no bundles in {options.bundles}; before this: make gpu-bundles", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as name:
            wheels = download(Path(name), options.python, options.wheel, _say)
            commit = _versions()["commit"]
            pieces = write(options.folder, wheels, options.bundles, options.python, commit, _say)
    except (KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for requirement, why in wheels.left_out.items():
        print(f"left out: {requirement} ({why})")
    megabytes = sum(piece.stat().st_size for piece in pieces) / 1e6
    print(f"{len(pieces)} pieces, {megabytes:.0f} MB; on the other machine: python{options.python} unpack.py TARGET")
    return 0


def _render() -> int:
    try:
        changed = render(RESULTS, ROOT / "docs" / "gpu.md", ROOT / "README.md")
    except ResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(f"{file.relative_to(ROOT)}: written" for file in changed) or "up to date")
    return 0


def _gpu() -> str:
    from mdnet_engines.system.gpu import visible_gpu

    if (gpu := visible_gpu()) is None:
        sys.exit("error: there is no CUDA GPU here, or no driver; try the script without one: --dry-run -o FILE")
    return gpu.name


def _told(arguments: list[str]) -> list[str]:
    """The command line without this machine's folders."""
    return [os.path.basename(word) if os.path.isabs(word) else word for word in arguments]  # noqa: PTH117, PTH119


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    try:
        git = ["git", "describe", "--always", "--dirty"]
        found["commit"] = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _say(text: str) -> None:
    print(text, flush=True)


def _tell(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _print(results: Results, output: Path) -> None:
    for stage in results.stages:
        print(f"{stage.status:14}{stage.name:14}{stage.seconds:6.0f} s  {stage.note}".rstrip())
        for row in stage.rows:
            if row.status in BAD:
                print(f"{'':14}  {row.name}: {row.status}, {row.note}")
    print(f"{results.gpu}: {'passed' if results.passed else 'FAILED'}; {output}")


if __name__ == "__main__":
    main()
