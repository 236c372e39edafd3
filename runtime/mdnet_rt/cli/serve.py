"""`mdnet-rt serve`: a bundle behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mdnet_engines.backends.candidates import BACKENDS, Backend
from mdnet_engines.console import say
from mdnet_engines.errors import UsageError, require
from mdnet_engines.framing import FaceOption
from mdnet_engines.options import config_option, is_from_config

_MODULES = ("fastapi", "uvicorn", "httptools", "python_multipart", "prometheus_client")
_MEBIBYTE = 2**20
_COUNT = click.IntRange(1, 1_000_000)
_SECONDS = click.FloatRange(0.1, 86_400)


@click.command()
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--bundle", "named", type=click.Path(path_type=Path), help="The same. Default: $MDNET_BUNDLE, ./mdnet-bundle."
)
@config_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free port.")
@click.option("--max-batch", type=click.IntRange(1, 1024), default=16, show_default=True, help="Images at once.")
@click.option(
    "--max-wait-ms", type=click.FloatRange(0, 10_000), default=5, show_default=True, help="For a fuller batch."
)
@click.option("--max-queue", type=_COUNT, default=256, show_default=True, help="Images in progress; beyond it 429.")
@click.option("--max-images", type=_COUNT, default=64, show_default=True, help="Images a request; beyond it 413.")
@click.option("--max-body-mib", type=_COUNT, default=32, show_default=True, help="A request's body; beyond it 413.")
@click.option("--max-held-mib", type=_COUNT, default=512, show_default=True, help="All bodies; beyond it 429.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=25_000_000,
    show_default=True,
    help="Width times height of an image.",
)
@click.option("--max-connections", type=_COUNT, default=512, show_default=True, help="Beyond it 503.")
@click.option("--read-timeout", type=_SECONDS, default=30, show_default=True, help="Seconds for a request to arrive.")
@click.option("--score-timeout", type=_SECONDS, default=30, show_default=True, help="Seconds for its scores.")
@click.option("--keep-alive", type=_SECONDS, default=75, show_default=True, help="Seconds a connection may be idle.")
@click.option("--drain-timeout", type=_SECONDS, default=30, show_default=True, help="Seconds to end after SIGTERM.")
@click.option("--face", type=FaceOption(), help="Which square of an image to score. Default: that of training.")
@click.option("--model-name", default="mdnet", show_default=True, help="In the paths of the Open Inference Protocol.")
@click.option("--access-log", is_flag=True, help="A line for each answer.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads per graph. Default: all cores.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs the graphs.")
@click.option("--no-check", is_flag=True, help="Serve even if the backend fails the bundle's gates on this machine.")
def serve(
    bundle: Path | None,
    named: Path | None,
    host: str,
    port: int,
    max_wait_ms: float,
    max_body_mib: int,
    max_held_mib: int,
    face: str | None,
    access_log: bool,
    threads: int,
    backend: Backend,
    no_check: bool,
    **limits: Any,  # which have the names of the settings
) -> int:
    """Serve a bundle over HTTP: POST /score, and the Open Inference Protocol under /v2.

    SIGTERM ends it when everything accepted is answered, with exit code 0; a second one at once.
    """
    if bundle is not None and named is not None and not is_from_config(click.get_current_context(), "named"):
        raise UsageError("give the bundle once, as the argument or with --bundle")
    for module in _MODULES:
        require(module, "serve")

    from mdnet_rt.server.http.serve import serve as run
    from mdnet_rt.server.settings import Settings

    settings = Settings(
        max_wait=max_wait_ms / 1000,
        max_body=max_body_mib * _MEBIBYTE,
        max_held=max_held_mib * _MEBIBYTE,
        **limits,
    )
    return run(
        bundle or named,
        host=host,
        port=port,
        settings=settings,
        backend=backend,
        threads=threads,
        check=not no_check,
        face=face,
        access_log=access_log,
        tell=say,
    )
