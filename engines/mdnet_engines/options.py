"""What every subcommand takes: `-q`, `-v`, `--version`; a configuration file; and suggestions for an unknown option."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from mdnet_engines.errors import UsageError, first_line, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_QUIET, _VERBOSE, _CONFIG = "mdnet.quiet", "mdnet.verbose", "mdnet.config"  # in a context's `meta`

_USUAL_NAMES = {
    "lr": ("learning-rate",),
    "bs": ("batch-size", "max-batch"),
    "batch-size": ("max-batch",),
    "num-epochs": ("epochs",),
    "early-stopping": ("patience",),
    "data-dir": ("data", "calib", "images"),
    "dataset": ("data", "calib", "images"),
    "output-dir": ("output",),
    "out": ("output",),
    "num-workers": ("workers", "threads"),
    "workers": ("threads",),
    "model": ("checkpoint", "bundle", "init"),
    "ckpt": ("checkpoint", "init"),
    "weights": ("checkpoint", "init"),
    "device": ("backend",),
    "gpu": ("device", "backend"),
    "cuda": ("device", "backend"),
    "fp16": ("amp", "precision"),
    "int8": ("precision",),
}
"""What other programs call an option → what ours is called; the first that a command has."""


def common_options() -> list[click.Parameter]:
    """`-q`, `-v` and `--version`, for a command that has none of them yet."""
    return [
        _flag("-q", "--quiet", help="Results and errors alone: no notes, no progress.", callback=_take_quiet),
        _flag("-v", "--verbose", help="Settings, steps with their times, memory.", callback=_take_verbose),
        _flag("--version", help="Show the version and exit.", callback=_show_version),
    ]


def is_quiet() -> bool:
    """Whether `-q` was given, to the group or the subcommand."""
    return _has(_QUIET)


def is_verbose() -> bool:
    """Whether `-v` was given, to the group or the subcommand."""
    return _has(_VERBOSE)


def config_option(command: Any) -> Any:
    """Add `--config FILE.toml`: its keys are the command's options without their dashes, and the command line wins."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_take_config,
        help="TOML file of options, such as: batch-size = 32. The command line wins.",
    )(command)


def settings(context: click.Context) -> list[str]:
    """Each option and argument of a command with its value, and where it is from unless that is its default."""
    source = click.core.ParameterSource
    origins = {source.COMMANDLINE: "command line", source.DEFAULT_MAP: context.meta.get(_CONFIG)}
    lines = []
    for parameter in context.command.params:
        if parameter.name in context.params:
            origin = origins.get(context.get_parameter_source(parameter.name) or source.DEFAULT)
            value = f"{_long_name(parameter)} = {context.params[parameter.name]}"
            lines.append(f"{value} ({origin})" if origin else value)
    return lines


def from_config() -> str:
    """What the running command takes from a configuration file, for notes: `FILE: learning-rate = 0.001, …`; or ""."""
    context = click.get_current_context(silent=True)
    if context is None or _CONFIG not in context.meta:
        return ""
    decided = [
        f"{_long_name(parameter)} = {context.params[parameter.name]}"
        for parameter in context.command.params
        if parameter.name in context.params and is_from_config(context, parameter.name)
    ]
    return f"{context.meta[_CONFIG]}: {', '.join(decided)}"


def is_from_config(context: click.Context, name: str) -> bool:
    """Whether a parameter has its value from a configuration file."""
    return context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP


def suggest(name: str, known: Iterable[str]) -> list[str]:
    """What of `known` (without dashes before it) was meant by an option `name` that does not exist."""
    bare, known = name.lstrip("-").replace("_", "-"), list(known)
    usual = next((each for each in _USUAL_NAMES.get(bare, ()) if each in known), None)
    return [usual] if usual else difflib.get_close_matches(bare, known)


def improve(error: click.ClickException) -> None:
    """Replace click's own suggestions, which compare the dashes too: it takes `--lr` for `--fold`."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        known = [name for each in error.ctx.command.get_params(error.ctx) for name in each.opts]
        found = suggest(error.option_name, [name.removeprefix("--") for name in known if name.startswith("--")])
        error.possibilities = [f"--{name}" for name in found]  # type: ignore[misc]


def _flag(*names: str, **how: Any) -> click.Option:
    return click.Option(names, is_flag=True, is_eager=True, expose_value=False, **how)


def _has(key: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(key))


def _take_quiet(context: click.Context, _: click.Parameter, given: bool) -> None:
    _take(context, _QUIET, given)


def _take_verbose(context: click.Context, _: click.Parameter, given: bool) -> None:
    _take(context, _VERBOSE, given)


def _take(context: click.Context, key: str, given: bool) -> None:
    if not given:
        return
    context.meta[key] = True
    if context.meta.get(_QUIET) and context.meta.get(_VERBOSE):
        raise UsageError("-q and -v contradict each other; give one of them")


def _show_version(context: click.Context, _: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        click.echo(f"{context.find_root().info_name}, version {version('mdnet')}")
        context.exit()


def _take_config(context: click.Context, _: click.Parameter, file: Path | None) -> None:
    if file is not None and not context.resilient_parsing:
        context.meta[_CONFIG] = printable(file)
        context.default_map = _read_config(context, file)


def _read_config(context: click.Context, file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            document = tomllib.load(stream)
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{printable(file)}: not TOML ({first_line(error)})") from error
    options, found = _long_options(context.command), {}
    for key, value in document.items():
        option = options.get(key.replace("_", "-"))
        if option is None:
            near = suggest(key, options)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(f"{printable(file)}: {context.command.name} has no option {printable(key)}{hint}")
        try:
            found[str(option.name)] = _value(context, option, value)
        except click.BadParameter as error:
            raise UsageError(f"{printable(file)}: {printable(key)}: {error.message}") from error
    return found


def _value(context: click.Context, option: click.Option, value: Any) -> Any:
    if option.is_flag or isinstance(value, bool):
        if not (option.is_flag and isinstance(value, bool)):
            raise click.BadParameter(f"{value} is neither true nor false" if option.is_flag else "it takes a value")
        return value
    if isinstance(value, (dict, list)):
        raise click.BadParameter("it takes one value")
    option.type_cast_value(context, str(value))  # so that the error can name the file
    return str(value)  # as typed: click would make 1 of 1.5 where an integer is wanted


def _long_options(command: click.Command) -> dict[str, click.Option]:
    """A command's own options by their names without dashes."""
    return {
        name.removeprefix("--"): option
        for option in command.params
        if isinstance(option, click.Option) and option.expose_value
        for name in option.opts
        if name.startswith("--")
    }


def _long_name(parameter: click.Parameter) -> str:
    return max(parameter.opts, key=len).lstrip("-")
