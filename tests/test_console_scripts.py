"""Each command that the package installs is there and says how it is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

POINTS: dict[str, EntryPoint] = {
    script.name: script
    for script in entry_points(group="console_scripts")
    if script.module.split(".")[0] in {"mdnet", "mdnet_export", "mdnet_rt"}
}
SCRIPTS = sorted(POINTS)
COMMANDS = [(name, command) for name in SCRIPTS for command in [None, *sorted(POINTS[name].load().commands)]]
"""Each group, and each of its subcommands."""


def test_the_three_commands_are_installed() -> None:
    assert SCRIPTS == ["mdnet", "mdnet-export", "mdnet-rt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_answered(script: str, tmp_path: Path) -> None:
    command = Path(sysconfig.get_path("scripts"), script)
    result = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("module", ["mdnet", "mdnet_export", "mdnet_rt"])
def test_a_command_can_be_run_as_a_module(module: str, tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"Usage: python -m {module}" in result.stdout


def invoke(script: str, command: str | None, *words: str) -> click.testing.Result:
    return CliRunner().invoke(POINTS[script].load(), [*([command] if command else []), *words], prog_name=script)


@pytest.mark.parametrize(("script", "command"), COMMANDS)
def test_every_command_understands_h_q_v_and_version(script: str, command: str | None) -> None:
    short, long = invoke(script, command, "-h"), invoke(script, command, "--help")
    assert (short.exit_code, short.stdout) == (0, long.stdout)
    assert f"Usage: {script}" in short.stdout
    for names in ("-q, --quiet", "-v, --verbose", "--version", "-h, --help"):
        assert short.stdout.count(names) == 1
    shown = invoke(script, command, "--version")
    assert (shown.exit_code, shown.stdout) == (0, f"{script}, version {version('mdnet')}\n")


@pytest.mark.parametrize(("script", "command"), COMMANDS)
def test_no_option_has_two_meanings(script: str, command: str | None) -> None:
    group: click.Group = POINTS[script].load()
    options = [name for each in (group.commands[command] if command else group).params for name in each.opts]
    assert len(options) == len(set(options))


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("mdnet train --lr 0.1", "--learning-rate"),
        ("mdnet train --bs 8", "--batch-size"),
        ("mdnet train --data-dir x", "--data"),
        ("mdnet train --output-dir x", "--output"),
        ("mdnet evaluate --dataset x", "--data"),
        ("mdnet-export build --ckpt x", "--checkpoint"),
        ("mdnet-rt score --num-workers 2", "--workers"),
        ("mdnet-rt score --output-dir x", "--output"),
        ("mdnet-rt score --model x", "--bundle"),
        ("mdnet-rt serve --batch-size 2", "--max-batch"),
        ("mdnet-rt serve --workers 2", "--threads"),
        ("mdnet-rt bench --device cuda", "--backend"),
    ],
)
def test_a_usual_name_is_answered_with_ours(line: str, meant: str) -> None:
    script, command, *words = line.split()
    result = invoke(script, command, *words)
    assert result.exit_code == 2
    assert f"No such option '{words[0]}'" in result.stderr.replace(f"option: {words[0]}", f"option '{words[0]}'")
    suggested = result.stderr.splitlines()[-1].partition("Did you mean")[2]
    assert [word.strip("'?.,") for word in suggested.split()] == [meant]


@pytest.mark.parametrize("script", ["mdnet", "mdnet-rt"])
def test_a_mistyped_subcommand_is_bad_usage(script: str) -> None:
    result = invoke(script, "scroe")
    assert result.exit_code == 2
    assert "No such command 'scroe'" in result.stderr


# ------------------------------------------------------------------------------------------------------- completion


def completed(script: str, shell: str, line: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    variable = f"_{script.replace('-', '_').upper()}_COMPLETE"
    environment = {**os.environ, variable: shell, **variables}
    command = Path(sysconfig.get_path("scripts"), script)
    return subprocess.run([command, *line], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_a_completion_script_is_written_for_each_shell(script: str, shell: str, word: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version")
    done = completed(script, f"{shell}_source", [])
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert script in done.stdout
    if shutil.which(shell) and shell != "bash":  # bash runs it below
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("shell", "words", "index", "expected"),
    [("zsh", "mdnet-rt sc", "1", "score"), ("fish", "mdnet-rt score --back", "--back", "--backend")],
)
def test_zsh_and_fish_get_their_answers(shell: str, words: str, index: str, expected: str) -> None:
    done = completed("mdnet-rt", f"{shell}_complete", [], COMP_WORDS=words, COMP_CWORD=index)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout.replace(",", "\n").replace("\t", "\n").splitlines()


@pytest.mark.skipif(shutil.which("bash") is None, reason="this system has no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mdnet-rt", "sc"], {"score"}),
        (["mdnet-rt", "score", "--backend", "onnxruntime-"], {"onnxruntime-cpu", "onnxruntime-cuda"}),
        (["mdnet", "train", "--learn"], {"--learning-rate"}),
        (["mdnet-export", "build", "--ver"], {"--verbose", "--version"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_completes_subcommands_options_and_values(words: list[str], expected: set[str], tmp_path: Path) -> None:
    scripts = sysconfig.get_path("scripts")
    name = words[0].replace("-", "_")
    program = f"""
        eval "$(_{name.upper()}_COMPLETE=bash_source {words[0]})"
        COMP_WORDS=({" ".join(words)}) COMP_CWORD={len(words) - 1}
        _{name}_completion {words[0]}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (set(done.stdout.split()), done.stderr) == (expected, "")
