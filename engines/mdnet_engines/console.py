"""What the three command lines share: one-line errors, exit codes, `--debug`, `-q` and `-v`, and progress."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rich.table import Table

from mdnet_engines.errors import MDNetError, MDNetWarning
from mdnet_engines.options import common_options, improve, is_quiet, is_verbose, settings
from mdnet_engines.progress import Lines, Progress
from mdnet_engines.system.cores import available_cores

PIPE_WIDTH = 100
_LONG_NAME = 24
_HELP = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Command(click.Group):
    """A click group whose subcommands end in one line and an exit code instead of a traceback.

    Exit codes: 0 done, 1 the work failed (or some images did), 2 bad usage, 130 interrupted.
    `--debug` before or after the subcommand lets the traceback through. `-h`, `-q`, `-v` and `--version` are understood
    in both places.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs["context_settings"] = {**_HELP, **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.params += common_options()
        self.epilog = "--debug anywhere on the line shows the traceback of a failure."

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.params += common_options()
        # click keeps the first help option it makes, and a command may run without its group first.
        cmd.context_settings = {**_HELP, **cmd.context_settings}
        cmd.callback = _with_facts(cmd.callback) if cmd.callback else None
        super().add_command(cmd, name)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _reader_may_leave():  # --help and --version print here
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            result = super().invoke(ctx)
            _flush()
            return result

    def main(self, args: Sequence[str] | None = None, *_: Any, **kwargs: Any) -> NoReturn:
        _fill_closed_streams()
        argv = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in argv
        kwargs["standalone_mode"] = False
        try:
            with _warnings_in_a_line():
                code = super().main([word for word in argv if word != "--debug"], **kwargs)
            with contextlib.suppress(BrokenPipeError):
                _flush()
        except click.ClickException as error:
            improve(error)
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = _say("interrupted", INTERRUPTED)
        except MDNetError as error:
            if debug:
                raise
            code = _say(str(error), error.exit_code)
        except OSError as error:
            if debug:
                raise
            code = _say(explain_os_error(error), 1)
        except Exception as error:
            if debug:
                raise
            text = _first_line(str(error)) or "no message"
            code = _say(f"unexpected {type(error).__name__}: {text} (add --debug for the traceback)", 1)
        _mute_if_unwritable()
        sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Show our own warnings as errors are shown; Python's way has a file, a line number and a line of code."""
    with warnings.catch_warnings():
        others: Any = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
            if issubclass(category, MDNetWarning):
                say(f"warning: {message}")
            else:
                others(message, category, *where, **how)

        warnings.showwarning = show
        warnings.simplefilter("always", MDNetWarning)
        yield


def _fill_closed_streams() -> None:
    """Where the shell has closed a standard stream (`2>&-`), take its number, which the next file would get.

    Messages are then dropped. `sys.stdin` and `sys.stdout` stay None, so that whoever needs them can say so.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(
                os.devnull, os.O_RDONLY
            )  # the lowest number that is free; to be written to it is as closed as before
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (for as long as the process lives)


@contextlib.contextmanager
def _reader_may_leave() -> Iterator[None]:
    """A reader of standard output that went away (`| head`) is no failure; click itself would exit with 1."""
    try:
        yield
    except BrokenPipeError:
        _mute_if_unwritable()
        raise click.exceptions.Exit(0) from None


def _mute_if_unwritable() -> None:
    """Point standard output at nothing where it can't be written, or Python's flush at exit complains again."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush() -> None:
    if sys.stdout is not None:  # closed by the shell: `mdnet-rt … >&-`
        sys.stdout.flush()


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _say(message: str, code: int) -> int:
    _echo(f"error: {message}")
    return code


def say(message: str) -> None:
    """One line to standard error: what is happening, for people. `-q` silences it. Results go to standard output."""
    if not is_quiet():
        _echo(message)


def warn_loudly(*lines: str) -> None:
    """What nobody should miss, to standard error: bold on a terminal, marked in a pipe. `-q` silences it too."""
    for line in () if is_quiet() else lines:
        click.secho(f"!!! {line}", err=True, bold=True, fg="yellow")


def _echo(message: str) -> None:
    click.echo(message.encode("utf-8", "backslashreplace").decode(), err=True)


def _with_facts(callback: Callable[..., Any]) -> Callable[..., Any]:
    """With `-v`: versions and settings before the work; time and memory after it."""

    @functools.wraps(callback)
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_verbose():
            context, start = click.get_current_context(), time.perf_counter()
            say(f"mdnet {version('mdnet')}, Python {platform.python_version()}, {platform.platform()}")
            say(f"{available_cores()} cores; {context.command_path} in {Path.cwd()} with")
            for line in settings(context):
                say(f"  {line}")
            context.call_on_close(lambda: say(f"{time.perf_counter() - start:.1f} s{_peak_memory()}"))
        return callback(*args, **kwargs)

    return run


def _peak_memory() -> str:
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f", at most {peak / 2**20:.0f} MiB of memory"


def stdout_is_terminal() -> bool:
    """Whether somebody watches standard output; false also if it is closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def show(table: Table) -> None:
    """Print a table to standard output: no line is cut where nobody is watching, or has spaces at its end.

    Not by rich itself, which ends the process with 1 when the reader of standard output has gone.
    """
    from rich.console import Console

    console = Console(legacy_windows=False)
    console = console if console.is_terminal else Console(width=10_000, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def show_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values to standard output, as wide as the terminal; in a pipe `PIPE_WIDTH`.

    Lines are broken at spaces alone, so that a path or a digest stays whole, and go on below the value. A long name has
    a line of its own.
    """
    width = shutil.get_terminal_size().columns if stdout_is_terminal() else PIPE_WIDTH
    indent = max((len(name) for name, _ in facts if len(name) <= _LONG_NAME), default=0) + 2
    click.echo(title)
    for name, value in facts:
        lines = textwrap.wrap(value, max(width - indent, 20), break_long_words=False, break_on_hyphens=False)
        if len(name) > _LONG_NAME:
            click.echo(name)
            name = ""
        for i, line in enumerate(lines or [""]):
            click.echo(f"{'' if i else name:<{indent}}{line}".rstrip())


def explain_os_error(error: OSError) -> str:
    """One line for the operating system's refusals that users meet: no space, no permission, no such file."""
    # An open file is named by its number, which tells a user nothing.
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
    at = f"{where}: " if where else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{at}no space left on the disk; free some, or write elsewhere with -o"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{at}no permission to read or write there"
    return _first_line(f"{at}{error.strerror or error}")


class _Notes(Progress):
    """Notes alone."""

    def note(self, text: str) -> None:
        say(f"note: {text}")


@contextlib.contextmanager
def show_progress(shown: bool = True, unit: str = "", *, lines: bool = True) -> Iterator[Progress]:
    """Show steps, counts and notes: live on a terminal, as lines in a pipe and with `-v`, not at all with `-q`.

    Args:
        shown: whether there is room for more than notes; on a terminal a bar and rows would share it.
        unit: of what is counted; with it, bars show their rate.
        lines: whether the work is long enough to be reported on in a pipe too.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if is_verbose() or (shown and lines and not console.is_terminal):
        yield Lines(say)
        return
    if is_quiet() or not (shown and console.is_terminal):
        yield _Notes()
        return
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.spinner import Spinner
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text("" if task.speed is None else f"{task.speed:.1f} {unit}/s")

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    bars = Bars(*columns, *([Rate()] if unit else []), TimeRemainingColumn(), console=console)
    spinner = Spinner("dots")

    class Shown(_Notes):
        def step(self, text: str) -> None:
            spinner.update(text=Text(f"{text} …"))

        def count(self, title: str, total: int | None) -> Callable[[int], None]:
            for task in bars.tasks:
                if task.finished:
                    bars.remove_task(task.id)
            return functools.partial(bars.advance, bars.add_task(title, total=total))

    def view() -> Group:
        return Group(*([spinner] if spinner.text else []), *([bars] if bars.tasks else []))

    with Live(console=console, transient=True, get_renderable=view):
        yield Shown()
