"""`mdnet-rt`: score images from the command line."""

from __future__ import annotations

import click

from mdnet_engines.console import Command
from mdnet_rt.cli_score import score


@click.group(cls=Command)
@click.version_option(package_name="mdnet", prog_name="mdnet-rt")
def main() -> None:
    """Score face photographs with a bundle that mdnet-export made."""


main.add_command(score)


if __name__ == "__main__":
    main()
