"""`mdnet-rt`: score images from the command line."""

from __future__ import annotations

import click

from mdnet_engines.console import Command
from mdnet_rt.cli.bench import bench
from mdnet_rt.cli.check import check, tune
from mdnet_rt.cli.compare import compare
from mdnet_rt.cli.score import score
from mdnet_rt.cli.serve import serve


@click.group("mdnet-rt", cls=Command)
def main() -> None:
    """Score face photographs with a bundle that mdnet-export made."""


main.add_command(score)
main.add_command(serve)
main.add_command(bench)
main.add_command(compare)
main.add_command(check)
main.add_command(tune)


if __name__ == "__main__":
    main()
