"""Options that every command takes: suggestions that fit, and a configuration file whose mistakes are named."""

from __future__ import annotations

import ast
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from mdnet_engines.console import Command
from mdnet_engines.options import config_option, from_config, is_from_config


@click.group(cls=Command)
def main() -> None:
    """A command line."""


@main.command()
@config_option
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=2e-3)
@click.option("--epochs", type=click.IntRange(min=1), default=16)
@click.option("--fold", type=click.IntRange(1, 5))
@click.option("--batch-size", type=int, default=32)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--init", type=click.Path(path_type=Path), required=True)
@click.option("--amp", is_flag=True)
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), default=Path("out"))
def train(**given: object) -> None:
    context = click.get_current_context()
    click.echo(repr({name: str(value) for name, value in given.items()}))
    click.echo(f"{from_config()}; {is_from_config(context, 'target')}")


@main.command()
@click.option("--max-batch", type=int)
@click.option("--threads", type=int)
def serve(max_batch: int, threads: int) -> None:
    pass


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def with_config(file: Path, text: str, *words: str) -> Result:
    file.write_text(text, encoding="utf-8")
    return run("train", "--config", str(file), *words)


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("train", "--lr", "--learning-rate"),
        ("train", "--learning_rate", "--learning-rate"),
        ("train", "--bs", "--batch-size"),
        ("train", "--output-dir", "--output"),
        ("train", "--weights", "--init"),
        ("train", "--gpu", "--device"),
        ("train", "--epoch", "--epochs"),
        ("train", "--fodl", "--fold"),
        ("train", "--quite", "--quiet"),
        ("serve", "--bs", "--max-batch"),
        ("serve", "--batch-size", "--max-batch"),
        ("serve", "--workers", "--threads"),
    ],
)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(command: str, typed: str, meant: str) -> None:
    result = run(command, typed, "1")
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if "No such option" in line]
    assert [word.strip("'?.,()") for word in line.split() if word.strip("'?.,()").startswith("--")] == [typed, meant]


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    line = run("serve", "--zzz", "1").stderr.splitlines()[-1]
    assert line.count("--") == 1


def test_the_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    text = 'learning-rate = 0.001\nepochs = 3\ninit = "start"\namp = true\noutput = "mine"\n'
    result = with_config(file, text, "--epochs", "4")
    given, notes = result.stdout.splitlines()
    assert ast.literal_eval(given) == (
        {
            "learning_rate": "0.001",
            "epochs": "4",
            "fold": "None",
            "batch_size": "32",
            "device": "cpu",
            "init": "start",
            "amp": "True",
            "target": "mine",
        }
    )
    assert notes == f"{file}: learning-rate = 0.001, init = start, amp = True, output = mine; True"


def test_underscores_will_do_for_dashes(tmp_path: Path) -> None:
    result = with_config(tmp_path / "a.toml", "init = 'x'\nlearning_rate = 1\namp = false")
    assert "'learning_rate': '1.0'" in result.stdout
    assert "'amp': 'False'" in result.stdout


def test_without_a_file_nothing_is_from_one() -> None:
    assert run("train", "--init", "x").stdout.splitlines()[1] == "; False"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr = 0.1", "train has no option lr; did you mean learning-rate?"),
        ("epoch = 1", "train has no option epoch; did you mean epochs?"),
        ("zzz = 1", "train has no option zzz"),
        ("help = true", "train has no option help"),
        ("config = 'b.toml'", "train has no option config"),
        ("[train]\nepochs = 1", "train has no option train"),
        ("epochs = 0", "epochs: 0 is not in the range x>=1."),
        ("epochs = 1.5", "epochs: '1.5' is not a valid integer range."),
        ("epochs = [1]", "epochs: it takes one value"),
        ("epochs = true", "epochs: it takes a value"),
        ("amp = 1", "amp: 1 is neither true nor false"),
        ("device = 'tpu'", "device: 'tpu' is not one of 'cpu', 'cuda'."),
        ("epochs = ]", "not TOML (Invalid value (at line 1, column 10))"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(text: str, message: str, tmp_path: Path) -> None:
    result = with_config(tmp_path / "my.toml", text, "--init", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path / 'my.toml'}: {message}\n"


def test_bytes_that_are_not_text_are_no_toml(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe")
    result = run("train", "--config", str(tmp_path / "my.toml"))
    assert result.exit_code == 2
    assert "my.toml: not TOML (" in result.stderr


def test_a_file_that_is_missing_is_bad_usage(tmp_path: Path) -> None:
    result = run("train", "--config", str(tmp_path / "gone.toml"))
    assert result.exit_code == 2
    assert "gone.toml" in result.stderr


def test_verbose_says_which_settings_are_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    lines = with_config(file, "epochs = 3", "-v", "--init", "x").stderr.splitlines()
    assert {f"  epochs = 3 ({file})", "  init = x (command line)", "  batch-size = 32"} <= set(lines)
