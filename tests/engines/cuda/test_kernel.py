"""The CUDA scan without a GPU: what its PTX says, and its very source run thread by thread on the CPU.

What only a GPU can show is not here: speed, and the error of the hardware's own exponential, which is exact to a
rounding in the emulation and within 2⁻²² in hardware.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import cuda_emulation
import numpy as np
import pytest
from cuda_emulation import KernelError, build_or_skip
from scan_cases import EVERY_CASE, NUMPY_TYPES, PARAMETERS, ScanCase, assert_close, make_inputs, reference_scan

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.errors import MDNetError
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_engines.ops.scan_shapes import INPUTS_V2

DTYPES = ("float32", "float16", "bfloat16")
CAPACITIES = (4, 16, 64)
SCALARS = ("channels", "length", "states")
SCALARS_V2 = (*SCALARS, "groups", "softplus")
KERNELS = {
    cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=capacity): capacity
    for reverse, dtype, capacity in product((False, True), DTYPES, CAPACITIES)
}
SMALL_KERNELS = [
    cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=16, small=True)
    for reverse, dtype in product((False, True), DTYPES)
]
KERNELS_V2 = {
    cuda_kernel.kernel_name(reverse=reverse, dtype=dtype, states=capacity, version=2): capacity
    for reverse, dtype, capacity in product((False, True), DTYPES, CAPACITIES)
}
ALL_KERNELS = {*KERNELS, *SMALL_KERNELS, *KERNELS_V2}
ENTRY = re.compile(r"^\.visible \.entry (\w+)\((.*?)\)(.*?)^\}", re.DOTALL | re.MULTILINE)


def entries(ptx: str) -> dict[str, tuple[list[str], str]]:
    """Of every kernel in a PTX text: the types of its arguments, and its body."""
    return {name: (re.findall(r"\.param \.(\w+)", head), body) for name, head, body in ENTRY.findall(ptx)}


def compiled(arch: str) -> str:
    try:
        return cuda_kernel.compile_ptx(arch)
    except MDNetError as error:
        if "needs NVRTC" not in str(error):
            raise
        pytest.skip(str(error))


# Names and PTX.


def test_the_smallest_kernel_that_holds_the_states_is_named() -> None:
    named = {n: cuda_kernel.kernel_name(reverse=False, dtype="float16", states=n) for n in (1, 4, 5, 16, 17, 64)}
    assert [name.removeprefix("selective_scan_forward_f16_") for name in named.values()] == (
        ["n4", "n4", "n16", "n16", "n64", "n64"]
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"states": 65}, "65"),
        ({"states": 0}, "1 to 64"),
        ({"dtype": "float64"}, "float64"),
        ({"states": 4, "small": True}, "small launches of 4 states"),
        ({"small": True, "version": 2}, "small launches of 16 states a channel in version 2"),
    ],
)
def test_a_call_without_a_kernel_is_refused_in_one_line(wrong: dict, says: str) -> None:
    with pytest.raises(MDNetError, match=says) as caught:
        cuda_kernel.kernel_name(**{"reverse": True, "dtype": "float32", "states": 16, **wrong})
    assert "\n" not in str(caught.value)


def test_committed_ptx_is_made_from_the_source() -> None:
    digest = hashlib.sha256(cuda_kernel.source().encode()).hexdigest()
    assert digest in cuda_kernel.ptx().splitlines()[0], "make it anew: python -m mdnet_engines.cuda.kernel"


def test_the_same_nvrtc_gives_the_committed_ptx_again() -> None:
    committed, again = cuda_kernel.ptx(), cuda_kernel.committed_ptx(compiled(cuda_kernel.COMPILED_FOR))
    mine, its = (text.splitlines()[0].rpartition("NVRTC ")[2] for text in (again, committed))
    if mine != its:
        pytest.skip(f"the committed PTX is NVRTC {its}'s, here is {mine}")
    assert again == committed


def test_every_kernel_takes_the_arguments_in_their_order() -> None:
    found = entries(cuda_kernel.ptx())
    assert found.keys() == ALL_KERNELS
    assert (*scan_op.INPUTS, *SCALARS, "y") == cuda_kernel.ARGUMENTS
    assert (*INPUTS_V2, *SCALARS_V2, "y", "h_last") == cuda_kernel.ARGUMENTS_V2
    for name, (types, _) in found.items():
        arguments = cuda_kernel.ARGUMENTS_V2 if name in KERNELS_V2 else cuda_kernel.ARGUMENTS
        assert types == ["u32" if argument in SCALARS_V2 else "u64" for argument in arguments]
    # All pointers look alike in PTX: their order is the operator's, and the source's.
    for define, arguments in (("SCAN(", cuda_kernel.ARGUMENTS), ("SCAN2(", cuda_kernel.ARGUMENTS_V2)):
        macro = cuda_kernel.source().partition(f"#define SELECTIVE_{define}")[2].replace("\\\n", "")
        declared = re.search(r"capacity\(([^)]*)\)\s*\{", macro)
        assert declared is not None
        assert tuple(re.split(r"\W+", part.strip())[-1] for part in declared[1].split(",")) == arguments


@pytest.mark.parametrize("arch", ["compute_80", "compute_89", "compute_90", "compute_120"])
def test_nvrtc_compiles_every_kernel(arch: str) -> None:
    text = compiled(arch)
    assert f".target sm_{arch.removeprefix('compute_')}" in text
    assert entries(text).keys() == ALL_KERNELS


def test_nvrtc_says_in_one_line_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(cuda_kernel.COMPILED_FOR)
    with pytest.raises(MDNetError, match=r"for compute_10: .*architecture") as caught:
        cuda_kernel.compile_ptx("compute_10")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(cuda_kernel, "source", lambda: "__device__ int f() { return nothing; }")
    with pytest.raises(MDNetError, match=r"selective_scan\.cu\(1\): error: .*nothing") as caught:
        cuda_kernel.compile_ptx()
    assert "\n" not in str(caught.value)


def test_without_nvrtc_the_message_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MDNetError, match=r"mdnet\[cuda-dev\]") as caught:
        cuda_kernel.compile_ptx()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "capacity"), [*KERNELS.items(), *KERNELS_V2.items()])
def test_one_exponential_for_each_state_and_step(name: str, capacity: int) -> None:
    _, body = entries(cuda_kernel.ptx())[name]
    states = capacity // 4  # of one of the four lanes that share a channel
    elements = 4  # of the tile's 32 × 16 that each of 128 threads prepares: a softplus each
    steps = 4 if capacity == 64 else 16  # unrolled; a lane has a gate for every fourth
    assert body.count("ex2.approx.ftz.f32") == states * steps + elements + steps // 4
    assert body.count("rcp.approx.ftz.f32") == steps // 4  # the gates'
    assert len(re.findall(r"\bex2\.|\blg2\.|\brcp\.|\bdiv\.|\bsqrt\.", body)) == states * steps + elements + steps // 2
    assert ".local" not in body  # all arrays are registers
    assert "call" not in body
    assert body.count("shfl.sync.bfly") == 3 * steps // 4
    assert body.count("bar.sync") == 2


@pytest.mark.parametrize("name", SMALL_KERNELS)
def test_a_small_kernel_makes_no_exponential_twice(name: str) -> None:
    _, body = entries(cuda_kernel.ptx())[name]
    steps, elements = 32, 2  # of a tile; of its 8 × 32 that each of 128 threads prepares
    places = 2  # in the text where a tile is prepared, and where it is stored: in the loop, and before or after it
    assert body.count("ex2.approx.ftz.f32") == steps + 2 * places * elements
    assert body.count("rcp.approx.ftz.f32") == places * elements
    assert ".local" not in body
    assert "call" not in body
    assert body.count("shfl.sync.bfly") == 15 * steps // 16
    assert body.count("bar.sync") == 2  # one in the loop


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_no_kernel_spills(arch: str, tmp_path: Path) -> None:
    if shutil.which("ptxas") is None:
        pytest.skip("needs ptxas, of the CUDA toolkit")
    (tmp_path / "scan.ptx").write_text(cuda_kernel.ptx())
    done = subprocess.run(
        ["ptxas", f"-arch={arch}", "-v", "scan.ptx", "-o", "scan.cubin"], cwd=tmp_path, capture_output=True, text=True
    )
    if "is not defined for option" in done.stderr:
        pytest.skip(f"this ptxas does not know {arch}")
    # It also refuses what is not in the PTX ISA that the text declares.
    assert done.returncode == 0, done.stderr
    report = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers.*?(\d+) bytes smem"
    found = re.findall(report, done.stderr, re.DOTALL)
    assert {name for name, *_ in found} == ALL_KERNELS
    for name, spilt, registers, shared in found:
        assert int(spilt) == 0, name
        blocks = 4 if KERNELS.get(name, 64) == 64 else 6  # on a multiprocessor, of 65536 registers
        if name in KERNELS_V2:  # what is optional takes registers
            blocks = 3 if KERNELS_V2[name] == 64 else 4
        assert int(registers) * cuda_kernel.THREADS * blocks <= 65536, name
        assert int(shared) <= 20 * 1024, name  # four or five blocks where there is least, on sm_89 and sm_120


# Run on the CPU.

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The kernels as they are: `run(inputs, reverse=…, small=…)`."""
    folder = tmp_path_factory.mktemp("scan")
    program = build_or_skip(cuda_kernel.source(), folder)

    def call(inputs: dict[str, np.ndarray], reverse: bool = False, small: bool = False) -> np.ndarray:
        return cuda_emulation.launch(program, folder, inputs, reverse=reverse, small=small)

    return call


WITH_SMALL = [case for case in EVERY_CASE if cuda_kernel.has_small(case.states)]
CASES_AND_KERNELS = [*((case, False) for case in EVERY_CASE), *((case, True) for case in WITH_SMALL)]


@pytest.mark.parametrize(
    ("case", "small"), CASES_AND_KERNELS, ids=[f"{case.name}{'-small' * small}" for case, small in CASES_AND_KERNELS]
)
def test_kernel_agrees_with_the_reference(case: ScanCase, small: bool, run: Run) -> None:
    inputs = make_inputs(case)
    got = run(inputs, case.reverse, small)
    assert got.dtype == NUMPY_TYPES[case.dtype]
    assert_close(got, reference_scan(**inputs, reverse=case.reverse), case.dtype)


STATES_AND_KERNELS = [*((n, False) for n in (1, 3, 4, 5, 16, 17, 33, 64)), *((n, True) for n in (5, 15, 16))]


@pytest.mark.parametrize(("states", "small"), STATES_AND_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_every_kernel_takes_sizes_that_fill_no_tile(
    states: int, small: bool, dtype: str, reverse: bool, run: Run
) -> None:
    case = ScanCase("", batch=3, channels=37, length=35, states=states, reverse=reverse, dtype=dtype)
    inputs = make_inputs(case)
    assert_close(run(inputs, reverse, small), reference_scan(**inputs, reverse=reverse), dtype)


TILES = [
    *product((1, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 257), (31, 32, 33), (False,)),
    *product((1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 257), (7, 8, 9), (True,)),
]


@pytest.mark.parametrize(("length", "channels", "small"), TILES)
def test_every_length_around_a_tile(length: int, channels: int, small: bool, run: Run) -> None:
    for reverse in (False, True):
        inputs = make_inputs(ScanCase("", 1, channels, length, states=16, reverse=reverse, dtype="float16"))
        assert_close(run(inputs, reverse, small), reference_scan(**inputs, reverse=reverse), "float16")


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reverse_scan_equals_flipped_forward(dtype: str, small: bool, run: Run) -> None:
    inputs = make_inputs(ScanCase("", batch=2, channels=33, length=41, states=16, reverse=False, dtype=dtype))
    flipped = {name: x if name in PARAMETERS else x[:, :, ::-1] for name, x in inputs.items()}
    # The same operations in the same order.
    np.testing.assert_array_equal(run(inputs, True, small), run(flipped, False, small)[:, :, ::-1])


@pytest.mark.parametrize("small", [False, True])
def test_each_image_of_a_batch_is_its_own(small: bool, run: Run) -> None:
    inputs = make_inputs(ScanCase("", batch=5, channels=33, length=20, states=16, reverse=False))
    whole = run(inputs, small=small)
    for image in range(5):
        alone = {name: x if name in PARAMETERS else x[image : image + 1] for name, x in inputs.items()}
        np.testing.assert_array_equal(run(alone, small=small)[0], whole[image])


ODD_VALUES = [
    *product(("u", "delta", "B", "C", "z"), (np.nan, np.inf, -np.inf)),
    *product(("A", "D", "delta_bias"), (np.nan,)),
]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("states", [5, 16])  # with and without states that only fill up
@pytest.mark.parametrize(("reverse", "dtype"), [(False, "float32"), (True, "float16")])
def test_what_is_not_finite_spoils_what_depends_on_it_and_nothing_else(
    reverse: bool, dtype: str, states: int, small: bool, run: Run
) -> None:
    # A slow decay: in float64 too, an infinite state outlives the sequence.
    inputs = make_inputs(ScanCase("", 2, 33, 37, states, reverse, dtype, delta_mean=-2.0))
    inputs["A"] /= 50
    clean, untroubled = reference_scan(**inputs, reverse=reverse), run(inputs, reverse, small)
    for tensor, value in ODD_VALUES:
        spoilt = {**inputs, tensor: inputs[tensor].copy()}
        spoilt[tensor][(1, 2, 18)[: inputs[tensor].ndim] if tensor not in PARAMETERS else 32] = value
        with np.errstate(all="ignore"):
            expected = reference_scan(**spoilt, reverse=reverse)
        got = run(spoilt, reverse, small)
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(np.isfinite(got), finite, f"{value} in {tensor}")
        assert not finite.all() or (tensor == "delta" and value == -np.inf)  # which only stops the clock for a step
        assert_close(np.where(finite, got, 0), np.where(finite, expected, 0), dtype)
        untouched = finite & (expected == clean)
        np.testing.assert_array_equal(got[untouched], untroubled[untouched], f"{value} in {tensor}")


def pointwise(u: np.ndarray, delta: np.ndarray, z: np.ndarray, *, B: float, D: float) -> dict[str, np.ndarray]:
    """Inputs [1, channels, length] of one state: y = (softplus(delta)·B + D)·u·silu(z), if B is 0 or length is 1."""
    _, channels, length = u.shape
    ones = np.ones((1, 1, length), u.dtype)
    return {
        **{"u": u, "delta": delta, "z": z, "B": ones * u.dtype.type(B), "C": ones},
        **{"A": np.full((channels, 1), -1, np.float32), "D": np.full(channels, D, np.float32)},
        "delta_bias": np.zeros(channels, np.float32),
    }


def test_softplus_keeps_its_relative_precision_at_both_ends(run: Run) -> None:
    x = np.concatenate([np.linspace(-87, 20, 1000), np.linspace(20, 1e4, 100), [0.0, 1e38]]).astype(np.float32)
    delta = x[None, :, None]
    # silu(64) is 64 in float32, and the division by it exact.
    got = run(pointwise(np.ones_like(delta), delta, np.full_like(delta, 64), B=1 / 64, D=0)).ravel().astype(np.float64)
    expected = np.logaddexp(0.0, x.astype(np.float64))
    # The exponent x·log₂e is rounded, which is |x|·2⁻²⁴ in the exponential's relative error; the rest is the
    # polynomial's 3.1 and a few more roundings of 2⁻²⁴.
    assert (np.abs(got - expected) <= expected * (np.where(x < 0, np.abs(x), 0) + 8) * 2.0**-24).all()
    np.testing.assert_array_equal(got[x > 20], x[x > 20])


def test_silu_goes_to_its_limits(run: Run) -> None:
    z = np.concatenate([np.linspace(-86, 200, 1000), [-3e38, -1000, -90, -0.0, 0.0, 3e38]]).astype(np.float32)
    z = z.reshape(1, 2, -1)
    got = run(pointwise(np.ones_like(z), np.zeros_like(z), z, B=0, D=1)).astype(np.float64)
    expected = z * np.exp(-np.logaddexp(0.0, -z.astype(np.float64)))
    # As above; below −87 the reciprocal is subnormal and counts as zero.
    assert (np.abs(got - expected) <= np.abs(expected) * (np.abs(np.minimum(z, 0)) + 8) * 2.0**-24 + 1e-36).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_are_read_and_rounded_as_the_formats_say(dtype: str, run: Run) -> None:
    """Holds the emulation's own conversions, which stand for the GPU's, to NumPy's: on every number of the format."""
    u = np.arange(1 << 16, dtype=np.uint16).view(NUMPY_TYPES[dtype])
    u = u[np.isfinite(u.astype(np.float32))].reshape(1, 32, -1)
    got = run(pointwise(u, np.zeros_like(u), np.full_like(u, 64), B=0, D=1 / 3))
    with np.errstate(over="ignore"):  # 64 / 3 of its largest numbers is too much for the format
        expected = (u.astype(np.float32) * np.float32(1 / 3) * np.float32(64)).astype(u.dtype)
    np.testing.assert_array_equal(np.abs(got), np.abs(expected))  # +0 in the sum of the states makes −0 into 0


# The emulation itself.

FAULTS = {
    "reads_past_the_end": ("y[at] = u[at + 1];", "heap-buffer-overflow"),
    "reads_before_the_start": ("y[at] = u[int(at) - 1];", "heap-buffer-overflow"),
    "indexes_past_shared_memory": ("shared[x + 1] = 0.0f; y[at] = u[at];", "out of bounds"),
    "forgets_an_output": ("if (at != 5) y[at] = u[at];", r"no block writes y\[5\]"),
    "writes_into_another_block": ("y[at] = u[at]; if (blockIdx.x == 1) y[7] = 0.0f;", r"two blocks write y\[7\]"),
    "loses_a_warp_at_a_barrier": ("if (x < 96) __syncthreads(); y[at] = u[at];", "thread 96 at the kernel's end"),
    "has_two_barriers": ("if (x < 64) __syncthreads(); else\n__syncthreads(); y[at] = u[at];", "thread 64 at __syncth"),
    "loses_a_lane_at_a_shuffle": ("y[at] = x ? __shfl_xor_sync(~0u, u[at], 1) : 0.0f;", "thread 0 waits at the ker"),
}
KERNEL = """extern "C" __global__ void {name}(
    const float* u, const float*, const float*, const float*, const float*, const float*, const float*, const float*,
    int, int, int, float* y) {{
  __shared__ float shared[128];
  const unsigned x = threadIdx.x, at = blockIdx.x * 128 + x;
  {body}
}}
"""
HONEST = {
    "uninitialised": "y[at] = shared[x];",
    "racing": "shared[x] = u[at]; y[at] = shared[127 - x];",
    "waiting": "shared[x] = u[at];\n__syncthreads(); y[at] = shared[127 - x];",
    "shuffling": "y[at] = __shfl_xor_sync(~0u, u[at], 3);",
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Kernels with a fault each, that copy u to y: `faulty(name)` gives u and y [2, 128]."""
    folder = tmp_path_factory.mktemp("faults")
    bodies = {**{name: body for name, (body, _) in FAULTS.items()}, **HONEST}
    program = build_or_skip("".join(KERNEL.format(name=name, body=body) for name, body in bodies.items()), folder)
    inputs = make_inputs(ScanCase("", batch=2, channels=4, length=32, states=1, reverse=False))

    def call(name: str) -> tuple[np.ndarray, np.ndarray]:
        y = cuda_emulation.launch(program, folder, inputs, reverse=False, kernel=name)
        return inputs["u"].reshape(2, 128), y.reshape(2, 128)

    return call


@pytest.mark.parametrize(("name", "says"), [(name, says) for name, (_, says) in FAULTS.items()])
def test_the_emulation_stops_at_a_fault(name: str, says: str, faulty: Run) -> None:
    with pytest.raises(KernelError, match=says):
        faulty(name)


def test_the_emulation_shows_a_race_and_what_was_never_written(faulty: Run) -> None:
    _, y = faulty("uninitialised")
    assert np.isnan(y).all()
    u, y = faulty("racing")  # one block runs its threads upwards, the other downwards
    np.testing.assert_array_equal(np.isnan(y), [[True] * 64 + [False] * 64, [False] * 64 + [True] * 64])
    u, y = faulty("waiting")
    np.testing.assert_array_equal(y, u[:, ::-1])
    u, y = faulty("shuffling")
    np.testing.assert_array_equal(y, u[:, np.arange(128) ^ 3])
