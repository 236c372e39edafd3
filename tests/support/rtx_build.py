"""Build TensorRT-RTX engines of ONNX files, which takes no GPU, and throw them away: python rtx_build.py FILE.onnx …

Prints one line for each: layers, size of the engine, seconds. Exits with 1 where one does not parse or build. It is a
script of its own because a failure in native code ends the process.
"""

from __future__ import annotations

import sys
import time

import tensorrt_rtx as trt

BATCHES = (1, 4, 8)  # minimum, optimum, maximum


def build(file: str) -> str:
    """Build one engine with a dynamic batch; describe it, or raise `RuntimeError` with the first reason."""
    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(file):
        raise RuntimeError(f"{file} does not parse: {parser.get_error(0)}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        profile.set_shape(tensor.name, *([batch, *list(tensor.shape)[1:]] for batch in BATCHES))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{file} parses, but no engine could be built")
    seconds = time.perf_counter() - start
    return f"{file}: {network.num_layers} layers, {plan.nbytes / 1e6:.1f} MB, {seconds:.1f} s"


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            print(build(name), flush=True)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
