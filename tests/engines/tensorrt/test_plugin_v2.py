"""The TensorRT plugins of version 2, with NVIDIA's own bindings: TensorRT gets what the kernel takes.

That the PTX gives the right result with it is tests/engines/cuda/test_ptx.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.cuda.ptx import ptx_of
from mdnet_engines.ops.scan_shapes import VARIANTS, Variant
from mdnet_engines.tensorrt.plugin_v2 import fixed_arguments

Ask = Callable[..., Any]

DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # NumPy's names, TensorRT's names
PARAMETERS = ("A", "D", "delta_bias", "h0", "h_last")
SCALARS = ("channels", "length", "states", "groups")
SIZES = {"batch": -1, "channels": 66, "length": 197, "states": 16, "groups": 2}
BATCHES = (1, 64)
every_variant = pytest.mark.parametrize("variant", [*VARIANTS.values()], ids=lambda variant: variant.name)


@every_variant
def test_outputs_have_the_types_and_symbolic_shapes_of_u_and_the_state(variant: Variant, ask: Ask) -> None:
    answer = ask("describe", name=variant.name, dtype="float16", sizes=SIZES, batches=BATCHES)
    assert answer["types"] == ["HALF", "FLOAT"][: len(variant.outputs)]
    for batch in BATCHES:
        assert answer["shapes"][str(batch)] == [[batch, 66, 197], [batch, 66, 16]][: len(variant.outputs)]
    tensors = (*variant.inputs, *variant.outputs)
    expected = [["FLOAT" if name in PARAMETERS else kind for name in tensors] for kind in DTYPES.values()]
    assert sorted(answer["combinations"]) == sorted(expected)
    assert answer["layouts"] == ["LINEAR"]


@every_variant
@pytest.mark.parametrize("groups", [0, 2, 33])
def test_the_engine_gets_a_kernel_of_just_its_arguments(groups: int, variant: Variant, ask: Ask) -> None:
    (answer,) = ask(
        "aot", name=variant.name, dtype="bfloat16", sizes={**SIZES, "groups": groups}, batches=BATCHES
    ).values()
    kernel = cuda_kernel.kernel_name(reverse=variant.reverse, dtype="bfloat16", states=16, version=2)
    assert answer["kernel"] == kernel
    assert re.findall(r"\.entry (\w+)", answer["ptx"]) == [kernel]
    head = re.search(r"\.entry \w+\((.*?)\)", answer["ptx"], re.DOTALL)
    assert head is not None
    arguments = (*variant.inputs, *SCALARS, *variant.outputs)
    fixed = fixed_arguments(variant)
    assert arguments == tuple(name for name in cuda_kernel.ARGUMENTS_V2 if name not in fixed)
    assert re.findall(r"\.param \.(\w+)", head[1]) == ["u32" if name in SCALARS else "u64" for name in arguments]
    per_group = 66 // (groups or 1)
    for batch in BATCHES:
        assert answer["scalars"][str(batch)] == [per_group, 197, 16, groups or 1]
        assert answer["grid"][str(batch)] == [batch, -(-per_group // 32), groups or 1]
        assert answer["block"][str(batch)] == [cuda_kernel.THREADS, 1, 1]
        assert answer["shared"][str(batch)] == [0]


@pytest.mark.parametrize("tensor", ["delta", "A", "B", "D", "delta_bias", "h0"])
def test_a_node_whose_tensors_do_not_fit_is_refused_in_words(tensor: str, ask: Ask) -> None:
    name = Variant(z=False, state=True).name
    said = ask("misfit", name=name, dtype="float32", sizes=SIZES, tensor=tensor)
    assert re.match(rf"{tensor} is \(.*\), but u \(-1, 66, 197\) and A \(.*\) need \(.*\)$", said), said


def test_what_is_fixed_is_no_parameter_and_nothing_else_changes() -> None:
    kernel = cuda_kernel.kernel_name(reverse=True, dtype="float32", states=4, version=2)
    whole, less = ptx_of(kernel).splitlines(), ptx_of(kernel, {"z": 0, "softplus": 1}).splitlines()
    gone = [line for line in whole if line not in less]
    new = [line for line in less if line not in whole]
    places = [cuda_kernel.ARGUMENTS_V2.index(name) for name in ("z", "softplus")]
    assert all(any(re.search(rf"_param_{place}\b", line) for place in places) for line in gone)
    assert new
    assert all(re.fullmatch(r"\tmov\.(u64 \t%rd\d+, 0|u32 \t%r\d+, 1);", line) for line in new)
    assert not any(re.search(rf"_param_{place}\b", line) for place in places for line in less)


@pytest.mark.parametrize("states", [4, 16, 64])
def test_ptxas_takes_every_variant(states: int, tmp_path: Path) -> None:
    if shutil.which("ptxas") is None:
        pytest.skip("needs ptxas, of the CUDA toolkit")
    for variant in VARIANTS.values():
        kernel = cuda_kernel.kernel_name(reverse=variant.reverse, dtype="float16", states=states, version=2)
        (tmp_path / "scan.ptx").write_text(ptx_of(kernel, fixed_arguments(variant)))
        command = ["ptxas", "-arch=sm_80", "-v", "scan.ptx", "-o", "scan.cubin"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert " 0 bytes spill stores" in done.stderr, variant.name
