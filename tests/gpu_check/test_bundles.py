"""`gpu_check.py bundles` builds what is missing; a stage without its bundle names that command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_scripts import module


def test_bundles_are_built_that_are_missing_and_that_this_version_can_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles, said, built = module("bundles"), [], []
    sizes = replace(module("sizes").FULL, precisions=("fp16", "int8", "fp3"))

    def run(command: list[str], **_: Any) -> Any:
        built.append(command[-3:])
        return SimpleNamespace(returncode=int(command[-2] == "int8"), stderr="Traceback\nValueError: no space\n")

    monkeypatch.setattr(bundles.subprocess, "run", run)
    (tmp_path / "full" / "fp16").mkdir(parents=True)
    (tmp_path / "full" / "fp16" / "manifest.json").touch()
    with pytest.raises(bundles.BuildError, match="full/int8: ValueError: no space"):
        bundles.make(sizes, tmp_path, {}, said.append)
    (tmp_path / "full" / "int8").mkdir()
    (tmp_path / "full" / "int8" / "manifest.json").touch()
    bundles.make(sizes, tmp_path, {}, said.append)
    assert built == [["full", "int8", str(tmp_path)], ["demo", "fp16", str(tmp_path)]]
    assert "full/fp3: left out, this version builds no fp3" in said


def test_a_bundle_that_nobody_built_is_named_with_the_command_that_builds_it(tmp_path: Path) -> None:
    bundles = module("bundles")
    context = SimpleNamespace(bundles=tmp_path, sizes=module("sizes").FULL)
    with pytest.raises(Exception, match="there is no fp8 bundle; build it before: make gpu-bundles") as caught:
        bundles.open_bundle(context, "fp8")
    assert module("context").judge(caught.value)[0] == "not installed"
