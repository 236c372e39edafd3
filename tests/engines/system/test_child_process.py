"""A process of its own: whatever becomes of it, whoever asked gets a result or one line."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import Recorded

from mdnet_engines.errors import MDNetError, UsageError
from mdnet_engines.system.child_process import CrashError, ask

Write = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module whose handler `work(request, say)` has this body; gives its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(body: str) -> str:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (tmp_path / "asked.py").write_text(
            "import os, signal, sys\n"
            "from mdnet_engines.system.child_process import serve\n"
            "from mdnet_engines.errors import MDNetError, UsageError\n"
            f"def work(request, say):\n{lines}"
            "serve({'work': work})\n"
        )
        return "asked"

    return write


def test_a_result_comes_back_with_steps_and_notes_on_the_way(module: Write) -> None:
    name = module("say('step', 'one')\nsay('note', 'hm')\nprint('noise')\nreturn {'double': 2 * request['value']}")
    progress = Recorded()
    result = ask(name, {"ask": "work", "value": 21}, name="it", progress=progress)
    assert (result, progress.steps, progress.notes) == ({"double": 42}, ["one"], ["hm"])


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        ("raise UsageError('typed wrong')", UsageError, "typed wrong"),
        ("raise MDNetError('no luck')", MDNetError, "no luck"),
        ("raise ValueError('odd\\nsecond line')", MDNetError, "unexpected ValueError: odd"),
        ("raise OSError(28, 'No space left', 'f')", OSError, "No space left"),
        ("os._exit(3)", CrashError, "it's process ended without an answer (exit code 3)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", CrashError, "it's process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGILL)", CrashError, "it's process was ended by SIGILL"),
        ("os.kill(os.getpid(), signal.SIGKILL)", CrashError, "it's process was killed (out of memory?)"),
    ],
)
def test_every_way_to_fail_is_one_line(module: Write, body: str, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as error:
        ask(module(body), {"ask": "work"}, name="it")
    assert type(error.value) is kind
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_crash_is_told_with_its_step_and_last_words(module: Write) -> None:
    body = "say('step', 'opening')\nsys.stderr.write('first\\nIllegal thing\\n')\nsys.stderr.flush()\n"
    with pytest.raises(CrashError, match="was ended by SIGABRT during opening, having said: Illegal thing"):
        ask(module(f"{body}os.kill(os.getpid(), {int(signal.SIGABRT)})"), {"ask": "work"}, name="it")


def test_modules_of_the_current_folder_are_not_imported(
    module: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "numpy.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(here)
    assert ask(module("import numpy\nreturn numpy.__name__"), {"ask": "work"}, name="it") == "numpy"
