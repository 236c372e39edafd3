"""An honest client beside hostile ones: python benchmarks/serve_bombs.py http://127.0.0.1:8000 examples/face-1.jpg

The hostile ones send a bomb again and again: a PNG of one colour, small as a file, and as large decoded as the server
lets in (--max-pixels). Prints one JSON object: the honest client's figures without them, with them, and theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image
from serve_load import SUFFIXES, load, request_for


def bomb(pixels: int) -> bytes:
    """A PNG of about so many pixels, in one colour."""
    side = int(pixels**0.5)
    with io.BytesIO() as stream:
        Image.new("RGB", (side, side), (90, 60, 30)).save(stream, "PNG", compress_level=9)
        return stream.getvalue()


async def measure(url: str, honest: bytes, hostile: bytes, *, bombs: int, seconds: float) -> dict[str, object]:
    """The figures, by who sends what beside whom."""
    alone = await load(url, [honest], clients=1, seconds=seconds, warmup=1)
    beside, theirs = await asyncio.gather(
        load(url, [honest], clients=1, seconds=seconds, warmup=1),
        load(url, [hostile], clients=bombs, seconds=seconds, warmup=1),
    )
    return {"honest, alone": alone, "honest, beside bombs": beside, "bombs": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of the server, as it says at its start")
    parser.add_argument("image", type=Path, help="what the honest client sends")
    parser.add_argument("--bombs", type=int, default=64, help="hostile clients")
    parser.add_argument("--pixels", type=int, default=25_000_000, help="of a bomb")
    parser.add_argument("--seconds", type=float, default=30, help="that are measured, each time")
    arguments = parser.parse_args()
    host = urlsplit(arguments.url).netloc
    honest = request_for(host, SUFFIXES[arguments.image.suffix.lower()], arguments.image.read_bytes())
    hostile = request_for(host, "image/png", bomb(arguments.pixels))
    try:
        figures = asyncio.run(measure(arguments.url, honest, hostile, bombs=arguments.bombs, seconds=arguments.seconds))
    except OSError as error:
        raise SystemExit(f"error: can't connect to {arguments.url}: {error}") from None
    json.dump(figures, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
