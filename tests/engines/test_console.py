"""What a failing command line says and with which code it ends: in one process, and as a shell sees it."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from rich.table import Table

from mdnet_engines.console import Command, explain_os_error, say, show, show_facts, show_progress, warn_loudly
from mdnet_engines.errors import BundleError, MDNetError, UsageError

# ------------------------------------------------------------------------------------------------------- one process


def app(action: Callable[[], object]) -> click.Group:
    """A command line whose one subcommand, `go`, does `action`."""

    @click.group(cls=Command)
    def main() -> None:
        """Score things."""

    @main.command()
    @click.option("--count", type=int)
    def go(count: int | None) -> object:
        return action()

    return main


def invoke(action: Callable[[], object], *arguments: str) -> Result:
    return CliRunner().invoke(app(action), arguments or ("go",))


def failing(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


def error_line(result: Result) -> str:
    """The only line of standard error, without its `error: `; standard output must be empty."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("value", "code"), [(None, 0), (0, 0), (1, 1), ("text", 0)])
def test_what_a_subcommand_returns_is_the_exit_code(value: object, code: int) -> None:
    result = invoke(lambda: value)
    assert (result.exit_code, result.output) == (code, "")


@pytest.mark.parametrize(
    "leave", [lambda: click.get_current_context().exit(7), lambda: sys.exit(7)], ids=["ctx.exit", "sys.exit"]
)
def test_an_explicit_exit_keeps_its_code(leave: Callable[[], object]) -> None:
    assert invoke(leave).exit_code == 7


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MDNetError("the engine is cold"), 1),
        (BundleError("vim.onnx is missing"), 1),
        (UsageError("-o takes a folder"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_our_errors_are_their_message_and_code(error: MDNetError, code: int) -> None:
    result = invoke(failing(error))
    assert error_line(result) == str(error)
    assert result.exit_code == code


@pytest.mark.parametrize("arguments", [("nosuch",), ("go", "--nosuch"), ("go", "--count", "many"), ("go", "extra")])
def test_bad_usage_is_2_and_says_what_is_wrong(arguments: tuple[str, ...]) -> None:
    for line in (arguments, ("--debug", *arguments)):
        result = invoke(lambda: None, *line)
        assert result.exit_code == 2
        assert re.search(r"^Error: .*(nosuch|many|extra)", result.stderr, re.MULTILINE)
        assert "Traceback" not in result.output


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()], ids=repr)
def test_an_interrupt_is_130(error: BaseException) -> None:
    result = invoke(failing(error))
    assert result.exit_code == 130
    assert result.stderr.split() == ["error:", "interrupted"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
        (errno.EROFS, "no permission"),
        (errno.ENOENT, "No such file"),
        (errno.EISDIR, "directory"),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
def test_a_refusal_of_the_system_is_explained_with_the_place(number: int, words: str) -> None:
    result = invoke(failing(OSError(number, os.strerror(number), "/data/photos/a.jpg")))
    line = error_line(result)
    assert line.startswith("/data/photos/a.jpg: ")
    assert words in line
    assert result.exit_code == 1


@pytest.mark.parametrize("name", [b"/data/\xff.jpg", Path("/data/a.jpg"), 99, None], ids=repr)
def test_every_kind_of_file_name_can_be_explained(name: object) -> None:
    """The system's errors name a file by text, bytes or open descriptor, or not at all."""
    assert "no space left" in explain_os_error(OSError(errno.ENOSPC, "No space left on device", name))


def test_a_system_error_without_a_number_keeps_its_text() -> None:
    assert error_line(invoke(failing(OSError("cannot identify image file")))) == "cannot identify image file"


@pytest.mark.parametrize("kind", [ValueError, OSError])
def test_a_message_of_several_lines_becomes_one(kind: type[Exception]) -> None:
    """Hugging Face's libraries raise OSErrors that are paragraphs."""
    line = error_line(invoke(failing(kind("first\nsecond\n\nthird"))))
    assert "first" in line


@pytest.mark.parametrize("error", [ValueError("bad value"), ZeroDivisionError(), KeyError("encoder")], ids=repr)
def test_an_unexpected_exception_is_one_line_with_its_type(error: Exception) -> None:
    result = invoke(failing(error))
    line = error_line(result)
    assert type(error).__name__ in line
    assert str(error) in line
    assert "--debug" in line
    assert result.exit_code == 1


def test_a_name_that_is_not_unicode_can_be_said() -> None:
    result = invoke(failing(MDNetError(f"{os.fsdecode(b'caf' + bytes([0xE9]))}.jpg is not an image")))
    assert error_line(result) == r"caf\udce9.jpg is not an image"


@pytest.mark.parametrize("arguments", [("--debug", "go"), ("go", "--debug"), ("go", "--debug", "--count", "1")])
@pytest.mark.parametrize("kind", [MDNetError, UsageError, OSError, ValueError])
def test_debug_lets_the_exception_through(kind: type[Exception], arguments: tuple[str, ...]) -> None:
    result = invoke(failing(kind("why")), *arguments)
    assert type(result.exception) is kind


def test_debug_changes_nothing_where_nothing_fails() -> None:
    result = invoke(lambda: click.echo("done"), "go", "--debug")
    assert (result.exit_code, result.output) == (0, "done\n")


def test_help_tells_of_debug() -> None:
    result = invoke(lambda: None, "--help")
    assert result.exit_code == 0
    assert "--debug" in result.stdout


def test_what_is_said_goes_to_standard_error() -> None:
    result = invoke(lambda: say("building …"))
    assert (result.stdout, result.stderr) == ("", "building …\n")


def report(**how: bool) -> Callable[[], None]:
    def action() -> None:
        with show_progress(**how) as progress:
            advance = progress.count("images", 10)
            advance(4)
            advance(6)
            progress.step("encoder")
            progress.note("a warning")
        say("next: rest")
        click.echo("42")

    return action


def test_a_pipe_gets_a_line_for_each_step_and_for_a_counts_start_and_end() -> None:
    result = invoke(report())
    assert re.sub(r"[0-9]+\.[0-9]", "#", result.stderr).splitlines() == [
        "[# s] images: 0 of 10",
        "[# s] images: 10 of 10, # s",
        "[# s] encoder",
        "note: a warning",
        "next: rest",
    ]
    assert (result.exit_code, result.stdout) == (0, "42\n")


@pytest.mark.parametrize("how", [{"lines": False}, {"shown": False}], ids=str)
def test_short_work_shows_only_notes_in_a_pipe(how: dict[str, bool]) -> None:
    assert invoke(report(**how)).stderr.splitlines() == ["note: a warning", "next: rest"]


@pytest.mark.parametrize("arguments", [("-q", "go"), ("go", "-q"), ("go", "--quiet")], ids=" ".join)
def test_quiet_leaves_results_and_errors(arguments: tuple[str, ...]) -> None:
    result = invoke(report(), *arguments)
    assert (result.stdout, result.stderr) == ("42\n", "")
    result = invoke(failing(MDNetError("the engine is cold")), *arguments)
    assert error_line(result) == "the engine is cold"


@pytest.mark.parametrize("arguments", [("-v", "go", "--count", "3"), ("go", "--verbose", "--count", "3")], ids=" ".join)
def test_verbose_adds_versions_settings_steps_and_what_it_took(arguments: tuple[str, ...]) -> None:
    result = invoke(report(lines=False), *arguments)
    first, second, *rest = result.stderr.splitlines()
    assert first.startswith(f"mdnet {version('mdnet')}, Python ")
    assert re.fullmatch(rf"[0-9]+ cores; main go in {re.escape(str(Path.cwd()))} with", second)
    assert rest[0] == "  count = 3 (command line)"
    assert rest[1].endswith("s] images: 0 of 10")
    assert "note: a warning" in rest
    assert re.fullmatch(r"[0-9.]+ s(, at most [0-9]+ MiB of memory)?", rest[-1])
    assert result.stdout == "42\n"


def test_quiet_and_verbose_together_are_refused() -> None:
    result = invoke(report(), "-q", "go", "-v")
    assert (result.exit_code, error_line(result)) == (2, "-q and -v contradict each other; give one of them")


@pytest.mark.parametrize("arguments", [("-h",), ("--help",), ("go", "-h"), ("go", "--help")], ids=" ".join)
def test_help_is_short_and_long_and_names_what_every_command_takes(arguments: tuple[str, ...]) -> None:
    result = invoke(lambda: None, *arguments)
    assert result.exit_code == 0
    for names in ("-q, --quiet", "-v, --verbose", "--version", "-h, --help"):
        assert names in result.stdout


@pytest.mark.parametrize("arguments", [("--version",), ("go", "--version")], ids=" ".join)
def test_the_version_is_that_of_the_package(arguments: tuple[str, ...]) -> None:
    result = invoke(lambda: None, *arguments)
    assert (result.exit_code, result.stdout) == (0, f"main, version {version('mdnet')}\n")


def test_a_loud_warning_is_marked_in_a_pipe() -> None:
    assert invoke(lambda: warn_loudly("this is", "the demo")).stderr == "!!! this is\n!!! the demo\n"
    assert invoke(lambda: warn_loudly("this is"), "go", "-q").output == ""


def test_facts_fit_a_pipe_and_keep_long_words_whole(capsys: pytest.CaptureFixture[str]) -> None:
    digest, many = "f" * 120, "word " * 100
    show_facts(
        "a bundle", [("input", "128 px"), ("words", many), ("a name that is far too long", "value"), ("sha", digest)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["a bundle", "input  128 px"]
    assert lines[lines.index("a name that is far too long") + 1] == "       value"
    assert lines[-1] == f"sha    {digest}"
    assert max(len(line) for line in lines[:-1]) <= 100
    assert sum(line.count("word") for line in lines) == 101


def test_lines_are_not_cut_where_nobody_is_watching() -> None:
    name = "/data/" + "/".join(f"folder{number}" for number in range(80)) + "/a.jpg"
    table = Table(name, show_edge=False)
    result = invoke(lambda: show(table))
    assert result.stdout.splitlines()[0].strip() == name


# --------------------------------------------------------------------------------------------------- as a shell sees it

PROGRAM = """
import signal, sys, time
import click
from mdnet_engines.console import Command
from mdnet_engines.errors import MDNetError

@click.group(cls=Command)
def main():
    pass

@main.command()
@click.argument("how")
@click.argument("count", type=int)
def write(how, count):
    for number in range(count):
        if how == "echo":
            click.echo(number)
        elif how == "print":
            print(number)
        else:
            sys.stdout.buffer.write(b"%d\\n" % number)

@main.command()
def fail():
    raise MDNetError("the engine is cold … warm it")

@main.command()
def wait():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    click.echo("ready")
    time.sleep(30)

main()
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    return [sys.executable, str(tmp_path / "program.py")]


@pytest.fixture
def environment() -> dict[str, str]:
    """As a user's: standard output that is not a terminal is buffered."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def test_a_failure_is_one_line_and_no_traceback(command: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run([*command, "fail"], capture_output=True, env=environment, timeout=60)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode() == "error: the engine is cold … warm it\n"


def test_debug_shows_the_traceback(command: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run([*command, "fail", "--debug"], capture_output=True, env=environment, timeout=60)
    assert result.returncode == 1
    assert b"Traceback (most recent call last)" in result.stderr
    assert b"MDNetError" in result.stderr


def test_a_message_survives_a_terminal_of_ascii(command: list[str], environment: dict[str, str]) -> None:
    result = subprocess.run(
        [*command, "fail"], capture_output=True, env={**environment, "PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.startswith(b"error: the engine is cold ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="this system's interrupt is another one")
def test_ctrl_c_is_130_and_no_traceback(command: list[str], environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*command, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.split() == ["error:", "interrupted"]


# Many lines fail while they are written; a few stay in Python's buffer and fail when the process ends.
WRITERS = [["write", how, count] for how in ("echo", "print", "bytes") for count in ("1", "100000")]


@pytest.mark.skipif(os.name != "posix", reason="this system has other pipes")
@pytest.mark.parametrize("arguments", [*WRITERS, ["--help"], ["--version"], ["write", "--help"]], ids=" ".join)
def test_a_reader_that_went_away_is_no_failure(
    arguments: list[str], command: list[str], environment: dict[str, str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [*command, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="this system has no shell of that kind")
@pytest.mark.parametrize(
    ("arguments", "code", "lines"),
    [(["write", "echo", "1"], 0, 0), (["write", "print", "1"], 0, 0), (["fail"], 1, 1), (["--help"], 0, 0)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_closed_standard_output_is_no_failure(
    arguments: list[str], code: int, lines: int, command: list[str], environment: dict[str, str]
) -> None:
    """`>&-`, as some job schedulers start their jobs: Python's `sys.stdout` is None then."""
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command, *arguments],
        stderr=subprocess.PIPE,
        env=environment,
        timeout=60,
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (code, lines), result.stderr.decode()


@pytest.mark.skipif(os.name != "posix", reason="this system has no head")
@pytest.mark.parametrize("how", ["echo", "print", "bytes"])
def test_head_takes_one_line_and_ends_it(how: str, command: list[str], environment: dict[str, str]) -> None:
    first = subprocess.Popen(
        [*command, "write", how, "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert first.stdout is not None
    head = subprocess.run(["head", "-1"], stdin=first.stdout, capture_output=True, timeout=60)
    first.stdout.close()  # or this process would be a reader that stays
    _, errors = first.communicate(timeout=60)
    assert head.stdout == b"0\n"
    assert (first.returncode, errors) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", WRITERS, ids=" ".join)
def test_a_full_disk_under_standard_output_is_one_line(
    arguments: list[str], command: list[str], environment: dict[str, str]
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(
            [*command, *arguments], stdout=full, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    (line,) = result.stderr.decode().splitlines()
    assert line.startswith("error: ")
    assert "no space left" in line
    assert result.returncode == 1
