"""How fast the selective scan is on this CPU, as ratios to its peers in the same run: python benchmarks/scan.py

One operator (D=768, L=197, N=16): the loop in PyTorch as Mamba's authors publish it for reference, a leaner loop, ONNX
Runtime with the function body and by its own LinearAttention, mambapy if it is installed, ONNX Runtime and PyTorch with
the native kernel. Its gradient (L=257): autograd through the loops against the native backward pass. Long sequences
(D=96, L=2,304 and 16,384). A layer of VMamba (N=1, four groups of 192 channels, L=784): one node, or one for a group.
One token of a decoder (D=1536, N=16), and how long copying its state takes.
Whole Vim-Small at 256²: PyTorch eager and `torch.compile` with the native operator, ONNX Runtime with and without it.

Contestants take turns, so that a slow moment of the machine hits all of them; a time is the median of the rounds, a
ratio the median of the rounds' ratios. Before each turn is a pause, in which the thread pool of the one before goes to
sleep, and an untimed run, which wakes the own one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import scan_peers
import torch
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mdnet.model.config import preset
from mdnet.model.vim import VisionMamba
from mdnet.scan import selective_scan
from mdnet_engines.ops import native, scan_v2
from mdnet_engines.ops import selective_scan as scan_op

CHANNELS, STATES = 768, 16
PAUSE = 0.05  # seconds; the pools of ONNX Runtime and OpenMP spin for some milliseconds after their work
Contestants = dict[str, Callable[[], object] | str]  # or why one can't take part
Measured = dict[str, dict[str, float]]


def published_loop(*tensors: Tensor) -> Tensor:
    """The algorithm of mamba-ssm's `selective_scan_ref`, which most ports start from: all decays and inputs first."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    steps = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + added[:, :, t]
        steps.append(torch.einsum("bdn,bn->bd", h, C[:, :, t]))
    return (torch.stack(steps, 2) + D[:, None] * u) * torch.nn.functional.silu(z)


def lean_loop(*tensors: Tensor) -> Tensor:
    """The formula, one step after the other, nothing of the size of all states in memory."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    steps = []
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        steps.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(steps, 2) + D[:, None] * u) * torch.nn.functional.silu(z)


def scan_inputs(
    batch: int, length: int, channels: int = CHANNELS, states: int = STATES, groups: int = 0
) -> dict[str, np.ndarray]:
    """Inputs as a trained Mamba has them: step sizes around 0.01 to 1, decays from slow to fast."""
    random = np.random.default_rng(0)
    steps = (batch, channels, length)
    mixes = (batch, groups, states, length) if groups else (batch, states, length)
    inputs = {
        "u": random.standard_normal(steps),
        "delta": random.standard_normal(steps),
        "A": -np.exp(random.uniform(0, np.log(max(states, 2)), (channels, states))),
        "B": random.standard_normal(mixes),
        "C": random.standard_normal(mixes),
        "D": random.standard_normal(channels),
        "z": random.standard_normal(steps),
        "delta_bias": random.uniform(-4, 0, channels),
    }
    return {name: value.astype(np.float32) for name, value in inputs.items()}


def one_node(inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one SelectiveScan with its function body."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in inputs.items()]
    node = helper.make_node(scan_op.FORWARD, list(inputs), ["y"], domain=scan_op.DOMAIN)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["u"].shape)
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    functions = [scan_op.function(scan_op.FORWARD)]
    return helper.make_model(
        helper.make_graph([node], "scan", values, [y]), opset_imports=opsets, functions=functions, ir_version=10
    )


def version_2(inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one operator of version 2 with its function body: without z or with a state, as the inputs are."""
    variant = scan_v2.Variant(z="z" in inputs, state="h0" in inputs)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, inputs[n].shape) for n in variant.inputs]
    node = helper.make_node(variant.name, list(variant.inputs), list(variant.outputs), domain=scan_op.DOMAIN)
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in variant.outputs]
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    return helper.make_model(
        helper.make_graph([node], "scan", values, outputs),
        opset_imports=opsets,
        functions=[variant.function()],
        ir_version=10,
    )


def node_for_each_group(inputs: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The same by version 1: slices, a scan for each group with a gate of 1, and a Concat."""
    groups, channels = inputs["B"].shape[1], inputs["A"].shape[0] // inputs["B"].shape[1]
    node = helper.make_node
    nodes = [node("Constant", [], ["one"], value_ints=[1])]
    for g in range(groups):
        bounds = {"from": [g * channels], "to": [(g + 1) * channels], "group": [g]}
        nodes += [node("Constant", [], [f"{name}{g}"], value_ints=value) for name, value in bounds.items()]
        for name in ("u", "delta", "z"):
            nodes.append(node("Slice", [name, f"from{g}", f"to{g}", "one"], [f"{name}{g}"]))
        for name in ("B", "C"):
            nodes.append(node("Gather", [name, f"group{g}"], [f"{name}_of{g}"], axis=1))
            nodes.append(node("Squeeze", [f"{name}_of{g}", "one"], [f"{name}{g}"]))
        names = [f"{name}{g}" for name in scan_op.INPUTS]
        nodes.append(node(scan_op.FORWARD, names, [f"y{g}"], domain=scan_op.DOMAIN))
    nodes.append(node("Concat", [f"y{g}" for g in range(groups)], ["y"], axis=1))
    gate = np.full(inputs["u"].shape, 1.27846454, np.float32)  # its SiLU is 1
    constants = [onnx.numpy_helper.from_array(gate, "z")]
    for name in ("A", "D", "delta_bias"):
        parts = enumerate(np.split(inputs[name], groups))
        constants += [onnx.numpy_helper.from_array(part, f"{name}{g}") for g, part in parts]
    used = ("u", "delta", "B", "C")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, inputs[name].shape) for name in used]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, inputs["u"].shape)
    opsets = [helper.make_opsetid("", scan_op.OPSET), helper.make_opsetid(scan_op.DOMAIN, scan_op.VERSION)]
    return helper.make_model(
        helper.make_graph(nodes, "groups", values, [y], constants),
        opset_imports=opsets,
        functions=[scan_op.function(scan_op.FORWARD)],
        ir_version=10,
    )


def session(model: bytes | str, threads: int, library: bool) -> onnxruntime.InferenceSession:
    """A session with our library registered, or without anything of ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(native.custom_op_library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def operator(batch: int, threads: int) -> Contestants:
    """One forward scan."""
    inputs = scan_inputs(batch, 197)
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    model = one_node(inputs).SerializeToString()
    body, kernel = (session(model, threads, library) for library in (False, True))
    return {
        "PyTorch, published loop": lambda: published_loop(*tensors),
        "PyTorch, lean loop": lambda: lean_loop(*tensors),
        "mambapy": scan_peers.mambapy_run(inputs),
        "ONNX Runtime, LinearAttention": scan_peers.linear_attention_run(inputs, threads),
        "ONNX Runtime, function body": lambda: body.run(None, inputs),
        "ONNX Runtime, native": lambda: kernel.run(None, inputs),
        "PyTorch, native": lambda: selective_scan(*tensors),
    }


def long(length: int, threads: int) -> Contestants:
    """One forward scan of few channels."""
    inputs = scan_inputs(1, length, channels=96)
    model = one_node(inputs).SerializeToString()
    body, kernel = (session(model, threads, library) for library in (False, True))
    return {
        "mambapy": scan_peers.mambapy_run(inputs),
        "ONNX Runtime, LinearAttention": scan_peers.linear_attention_run(inputs, threads),
        "ONNX Runtime, function body": lambda: body.run(None, inputs),
        "ONNX Runtime, native": lambda: kernel.run(None, inputs),
    }


def vmamba(batch: int, threads: int) -> Contestants:
    """Four directions of a layer, one state, no gate; and as many channels in one group."""
    inputs = scan_inputs(batch, 784, channels=4 * 192, states=1, groups=4)
    of_node = {name: value for name, value in inputs.items() if name != "z"}
    flat = {name: value[:, 0] if name in ("B", "C") else value for name, value in of_node.items()}
    split = {name: inputs[name] for name in ("u", "delta", "B", "C")}
    model = version_2(of_node).SerializeToString()
    body, kernel = (session(model, threads, library) for library in (False, True))
    one_group = session(version_2(flat).SerializeToString(), threads, library=True)
    nodes = session(node_for_each_group(inputs).SerializeToString(), threads, library=True)
    return {
        "a node for each group": lambda: nodes.run(None, split),
        "one group": lambda: one_group.run(None, flat),
        "function body": lambda: body.run(None, of_node),
        "one node, native": lambda: kernel.run(None, of_node),
    }


def one_token(batch: int, threads: int) -> Contestants:
    """A decoder's step of one layer."""
    inputs = scan_inputs(batch, 1, channels=1536)
    inputs["h0"] = np.random.default_rng(1).standard_normal((batch, 1536, STATES)).astype(np.float32)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    model = version_2(inputs).SerializeToString()
    body, kernel = (session(model, threads, library) for library in (False, True))
    copy = np.empty_like(inputs["h0"])
    return {
        "a copy of the state": lambda: np.copyto(copy, inputs["h0"]),
        "ONNX Runtime, function body": lambda: body.run(None, inputs),
        "ONNX Runtime, native": lambda: kernel.run(None, inputs),
        "PyTorch, native": lambda: selective_scan(**tensors, return_last_state=True),
    }


def gradient(batch: int, _threads: int) -> Contestants:
    """Forward and backward pass for the gradients of all eight inputs."""
    tensors = [torch.from_numpy(value).requires_grad_() for value in scan_inputs(batch, 257).values()]

    def differentiate(scan: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(*tensors).sum(), tensors)

    return {
        "autograd, published loop": differentiate(published_loop),
        "autograd, lean loop": differentiate(lean_loop),
        "native": differentiate(selective_scan),
    }


def vim_small(batch: int, threads: int) -> Contestants:
    """The whole backbone, 48 scans."""
    from mdnet.model.net import random_mdnet
    from mdnet_export.graphs.export import export_graph

    config = preset("sd15-vim-s")
    torch.manual_seed(0)
    vim = VisionMamba(config).eval()
    image = torch.randint(0, 256, (batch, config.image_size, config.image_size, 3), dtype=torch.uint8)
    feeds = {"image": image.numpy()}
    compiled = torch.compile(vim, fullgraph=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = random_mdnet(preset("demo"), seed=0)
        model.vim, model.config = vim, config
        file = str(export_graph(model, "vim", Path(folder)))
        body, kernel = (session(file, threads, library) for library in (False, True))

    def without_gradient(run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.inference_mode():
                return run(image)

        return call

    return {
        "PyTorch eager, native": without_gradient(vim),
        "torch.compile, native": without_gradient(compiled),
        "ONNX Runtime, function body": lambda: body.run(None, feeds),
        "ONNX Runtime, native": lambda: kernel.run(None, feeds),
    }


def measure(contestants: Contestants, rounds: int) -> Measured:
    """Let them take turns; give each one's median time and the median ratio of every other to it."""
    present = {name: run for name, run in contestants.items() if not isinstance(run, str)}
    times: dict[str, list[float]] = {name: [] for name in present}
    for _ in range(rounds):
        for name, run in present.items():
            time.sleep(PAUSE)
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    seconds = {name: np.array(values) for name, values in times.items()}
    return {
        name: {"ms": float(np.median(own) * 1e3)}
        | {other: float(np.median(seconds[other] / own)) for other in present if other != name}
        for name, own in seconds.items()
    }


SUITES: dict[str, tuple[Callable[[int, int], Contestants], int, int]] = {
    # what → (contestants for a batch, or a length, and threads; the batch or length; rounds)
    "scan, B=1": (operator, 1, 41),
    "scan, B=8": (operator, 8, 21),
    "long scan, L=2304": (long, 2304, 15),
    "long scan, L=16384": (long, 16384, 5),
    "VMamba layer, N=1": (vmamba, 1, 41),
    "one token, D=1536": (one_token, 1, 41),
    "scan and gradient, B=8": (gradient, 8, 5),
    "Vim-Small, B=1": (vim_small, 1, 15),
    "Vim-Small, B=8": (vim_small, 8, 7),
}


def main() -> None:
    """Measure, print a table, and write the figures where `-o` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="turns of each contestant (default: 5 to 41)")
    parser.add_argument("--only", help="run the suites whose name contains this")
    parser.add_argument("-o", "--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if native.custom_op_library() is None:
        sys.exit(f"error: {native.MISSING}")
    chosen = {what: suite for what, suite in SUITES.items() if (options.only or "") in what}
    if not chosen:
        parser.error(f"--only {options.only!r} is in none of: {'; '.join(SUITES)}")
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; expected 1 or more")
    if options.output and not options.output.parent.is_dir():
        parser.error(f"-o {options.output}: there is no folder {options.output.parent}")
    torch.set_num_threads(options.threads)
    results: dict[str, Measured] = {}
    console = Console(width=None if sys.stdout.isatty() else 120)
    for what, (suite, batch, rounds) in chosen.items():
        contestants = suite(batch, options.threads)
        measured = results[what] = measure(contestants, options.rounds or rounds)
        ours = [name for name in measured if name.endswith("native")]
        table = Table("", "ms", *(f"{name} is × faster" for name in ours), title=f"{what}, {options.threads} threads")
        for name, figures in measured.items():
            ratios = (f"{measured[mine][name]:.3g}" if mine != name else "" for mine in ours)
            table.add_row(name, f"{figures['ms']:.3g}", *ratios)
        for name, reason in contestants.items():
            if isinstance(reason, str):
                table.add_row(name, reason)
        console.print(table)
    if options.output:
        facts = {
            "command": f"python {' '.join(sys.argv)}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, kernel build {native.best_isa()}",
            **{package: version(package) for package in ("torch", "onnxruntime")},
        }
        options.output.write_text(
            json.dumps({**facts, "threads": options.threads, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
