"""Processes forked from one that has scored: they are refused at once, and they end. Each test has a time-out."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE = 60  # seconds, for what takes two
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the [openvino] extra")
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.parametrize("backend", ["onnxruntime-cpu", pytest.param("openvino", marks=needs_openvino)]),
]

OPEN = """
import multiprocessing, os, sys
import numpy as np
from mdnet_rt import Scorer

bundle, backend = sys.argv[1:]
image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
scorer = Scorer.open(bundle, backend=backend, threads=2)
scorer.score(image)

def message(call):
    try:
        return f"no error: {call()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def in_child(work):
    child = os.fork()
    if not child:
        print(work(), flush=True)
        sys.exit(7)  # by the way of every destructor
    print("exit code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def lines_of(script: str, bundle: Path, backend: str) -> list[str]:
    """What the script prints; its forks end with it, or at the deadline."""
    command = [sys.executable, "-c", OPEN + script, str(bundle), backend]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            return process.communicate(timeout=DEADLINE)[0].splitlines()
        except subprocess.TimeoutExpired:
            pytest.fail(f"still waiting after {DEADLINE} s")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)


def test_a_pool_of_forks_is_refused_at_once(shared_bundle: Path, backend: str) -> None:
    script = """
def work(_): return scorer.score(image)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(message(lambda: pool.map(work, range(4))))
"""
    (line,) = lines_of(script, shared_bundle, backend)
    assert line.startswith("MDNetError: this scorer was opened in another process (")
    assert line.endswith("), before a fork; open one in each process, after the fork")


def test_a_fork_that_was_refused_ends(shared_bundle: Path, backend: str) -> None:
    refused, code = lines_of("in_child(lambda: message(lambda: scorer.score(image)))", shared_bundle, backend)
    assert "opened in another process" in refused
    assert code == "exit code 7"


@pytest.mark.parametrize("work", ["0", "scorer.close()", "globals().pop('scorer') and None"])
def test_a_fork_ends_whatever_becomes_of_the_scorer(shared_bundle: Path, backend: str, work: str) -> None:
    *_, code = lines_of(f"in_child(lambda: {work})", shared_bundle, backend)
    assert code == "exit code 7"


def test_the_process_before_the_fork_scores_on(shared_bundle: Path, backend: str) -> None:
    script = """
before = scorer.score(image)[0].score
in_child(lambda: scorer.close())
print(scorer.score(image)[0].score == before)
"""
    assert lines_of(script, shared_bundle, backend)[-1] == "True"


def test_a_fork_opens_a_scorer_of_its_own_or_is_refused_at_once(shared_bundle: Path, backend: str) -> None:
    script = """
expected = scorer.score(image)[0].score
in_child(lambda: message(lambda: Scorer.open(bundle, backend=backend).score(image)[0].score == expected))
"""
    opened, code = lines_of(script, shared_bundle, backend)
    if backend == "openvino":
        assert opened.startswith("MDNetError: OpenVINO has run before this process was forked")
    else:
        assert opened == "no error: True"
    assert code == "exit code 7"
