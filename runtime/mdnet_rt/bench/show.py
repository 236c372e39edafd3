"""Tables on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mdnet_engines.console import output

if TYPE_CHECKING:
    from rich.table import Table


def show(table: Table) -> None:
    """Print a table without spaces at the ends of its lines.

    Not by rich itself, which ends the process with 1 when the reader of standard output has gone.
    """
    console = output()
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
