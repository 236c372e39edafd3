"""PyTorch as a contestant of `mdnet-rt bench --against pytorch`: `python -m mdnet.cli.bench_worker`.

Eager, in float32 and channels_last, with the scan that `mdnet.scan` takes here: what a user of the checkpoint would
have without exporting it. Weights and pixels are random, as much work as others. The runtime, which never imports
PyTorch, starts this in a process of its own and speaks with it as `mdnet_rt.bench.process` says.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NoReturn

from mdnet.cli.common import require_train
from mdnet.model.config import MDNetConfig, preset
from mdnet_engines.system.child_process import serve


def main() -> NoReturn:
    """Answer requests until there are no more: `open`, with `preset`, `image_size`, `batch_size`, `threads`; `run`."""
    stages: dict[str, Callable[[], object]] = {}

    def open_(request: dict[str, Any], say: object) -> dict[str, Any]:
        config = preset(request["preset"])
        config = dataclasses.replace(config, image_size=request.get("image_size", config.image_size))
        found, facts = open_stages(config, request["batch_size"], request["threads"])
        stages.update(found)
        return facts

    def run(request: dict[str, Any], say: object) -> float:
        start = time.perf_counter()
        stages[request["stage"]]()
        return time.perf_counter() - start

    serve({"open": open_, "run": run})


def open_stages(
    config: MDNetConfig, batch_size: int, threads: int
) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """The model's parts and the whole as functions without arguments, and what there is to say about them.

    `shapes` are those of the streams' outputs without the batch, by the names that a bundle's graphs give them: how a
    reader sees that the model is as large as the bundle's.

    Raises:
        MDNetError: PyTorch or diffusers is missing.
    """
    require_train()
    import torch

    from mdnet.model.net import random_mdnet
    from mdnet_engines.ops import native

    torch.set_num_threads(threads)
    model: Any = random_mdnet(config, seed=0)  # its type does not know memory_format
    model.to(memory_format=torch.channels_last)
    size = config.image_size
    image = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        features, tokens = model.diffusion(image), model.vim(image)
    stages: dict[str, Callable[[], object]] = {
        "encoder": lambda: model.diffusion(image),
        "vim": lambda: model.vim(image),
        "fusion": lambda: model.fusion(features, tokens),
        "graphs": lambda: model(image),
    }
    stages = {name: torch.inference_mode()(run) for name, run in stages.items()}
    outputs = {**features, "tokens": tokens}
    return stages, {
        "images_per_run": dict.fromkeys(stages, batch_size),
        "graphs": dict.fromkeys(("encoder", "vim", "fusion"), "pytorch eager fp32 channels_last"),
        "scan": "native" if native.library() is not None else "loop",
        "shapes": {name: list(value.shape[1:]) for name, value in outputs.items()},
    }


if __name__ == "__main__":
    main()
