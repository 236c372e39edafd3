"""The committed PTX, executed on the CPU as TensorRT and ONNX Runtime launch it.

What only a GPU can show is not here: what ptxas makes of the PTX, speed, the error of the hardware's own exponential.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import cuda_stub
import numpy as np
import ptx_launches
import pytest
import tensorrt_stubs
from ptx_launches import Launch
from ptx_on_cpu import PtxError
from scan_cases import (
    EVERY_CASE,
    EVERY_VARIANT_CASE,
    ScanCase,
    VariantCase,
    assert_close,
    expected_of,
    make_inputs,
    make_variant_inputs,
    reference_scan,
)

from mdnet_engines.cuda import kernel as cuda_kernel
from mdnet_engines.ops import native

IN_EVERY_RUN = (
    *("one_of_everything", "one_state_reverse", "odd_sizes", "vim_tokens", "vim_batch_reverse", "wide_batch"),
    *("delta_of_both_extremes_reverse", "views", "two_steps_reverse_float16", "odd_sizes_bfloat16"),
    *("vim_tokens_float16", "views_reverse_bfloat16"),
)
CASES = [
    pytest.param(i, id=case.name, marks=() if case.name in IN_EVERY_RUN else pytest.mark.slow)
    for i, case in enumerate(EVERY_CASE)
]


VARIANTS_IN_EVERY_RUN = (
    *("state", "state_of_one_step_reverse", "groups", "vmamba", "raw_delta_reverse", "without_anything"),
    *("everything_reverse_float16", "state_bfloat16"),
)
VARIANTS = [case for case in EVERY_VARIANT_CASE if case.states <= cuda_kernel.MAX_STATES]
VARIANT_PLACES = [
    pytest.param(i, id=case.name, marks=() if case.name in VARIANTS_IN_EVERY_RUN else pytest.mark.slow)
    for i, case in enumerate(VARIANTS)
]


# More than a small launch: the native library takes the other kernel.
LARGE = ScanCase("large", batch=28, channels=57, length=37, states=13, reverse=True, dtype="bfloat16")


@pytest.fixture(scope="module")
def by_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> list[list[Launch]]:
    if reason := tensorrt_stubs.missing():
        pytest.skip(reason)
    return ptx_launches.by_tensorrt(EVERY_CASE, tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture(scope="module")
def by_library(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    if native.custom_op_library() is None or cuda_stub.COMPILER is None:
        pytest.skip("needs the native library and a C compiler")
    return ptx_launches.by_library([*EVERY_CASE, LARGE], tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def variants_by_library(tmp_path_factory: pytest.TempPathFactory) -> list[Launch]:
    if native.custom_op_library() is None or cuda_stub.COMPILER is None:
        pytest.skip("needs the native library and a C compiler")
    return ptx_launches.by_library(VARIANTS, tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="module")
def variants_by_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> list[list[Launch]]:
    if reason := tensorrt_stubs.missing():
        pytest.skip(reason)
    return ptx_launches.by_tensorrt(VARIANTS, tmp_path_factory.mktemp("variants"))


def check_variant(launch: Launch, case: VariantCase) -> None:
    inputs = make_variant_inputs(case)
    zeros = np.zeros(case.channels, np.float32)
    y, h_last = ptx_launches.run_with_state(launch, {"D": zeros, "delta_bias": zeros, **inputs})
    expected, last = expected_of(case, inputs)
    assert_close(y, expected, case.dtype)
    assert (h_last is not None) == case.state
    if h_last is not None:
        assert_close(h_last, last)


def check(launch: Launch, case: ScanCase) -> None:
    inputs = make_inputs(case)
    assert_close(ptx_launches.run(launch, inputs), reference_scan(**inputs, reverse=case.reverse), case.dtype)


def test_the_cases_of_every_run_exist() -> None:
    assert set(IN_EVERY_RUN) <= {case.name for case in EVERY_CASE}
    assert set(VARIANTS_IN_EVERY_RUN) <= {case.name for case in VARIANTS}


@pytest.mark.parametrize("place", CASES)
def test_as_tensorrt_launches_it_the_ptx_agrees_with_the_reference(place: int, by_tensorrt: list[list[Launch]]) -> None:
    assert len(by_tensorrt[place]) == 1 + cuda_kernel.has_small(EVERY_CASE[place].states)
    for launch in by_tensorrt[place]:  # with either kernel, where there are two
        check(launch, EVERY_CASE[place])


@pytest.mark.parametrize("place", CASES)
def test_as_onnxruntime_launches_it_the_ptx_agrees_with_the_reference(place: int, by_library: list[Launch]) -> None:
    check(by_library[place], EVERY_CASE[place])


@pytest.mark.parametrize("place", VARIANT_PLACES)
def test_version_2_as_onnxruntime_launches_it_agrees_with_the_reference(
    place: int, variants_by_library: list[Launch]
) -> None:
    check_variant(variants_by_library[place], VARIANTS[place])


@pytest.mark.parametrize("place", VARIANT_PLACES)
def test_version_2_as_tensorrt_launches_it_agrees_with_the_reference(
    place: int, variants_by_tensorrt: list[list[Launch]]
) -> None:
    (launch,) = variants_by_tensorrt[place]  # there is one kernel
    check_variant(launch, VARIANTS[place])


def test_a_cut_changes_no_bit(tmp_path: Path) -> None:
    if native.custom_op_library() is None or cuda_stub.COMPILER is None:
        pytest.skip("needs the native library and a C compiler")
    case, cut = VariantCase("", 1, 6, 37, 16, reverse=False, dtype="float16", groups=2, state=True), 21
    cases = [case, replace(case, length=cut), replace(case, length=37 - cut)]
    whole, first, second = ptx_launches.by_library(cases, tmp_path)
    inputs, sequences = make_variant_inputs(case), ("u", "delta", "z", "B", "C")
    y, h_last = ptx_launches.run_with_state(whole, inputs)
    begun, h = ptx_launches.run_with_state(first, {**inputs, **{name: inputs[name][..., :cut] for name in sequences}})
    rest = {**inputs, **{name: inputs[name][..., cut:] for name in sequences}, "h0": h}
    ended, h = ptx_launches.run_with_state(second, rest)
    np.testing.assert_array_equal(np.concatenate([begun, ended], axis=2), y)
    np.testing.assert_array_equal(h, h_last)


def test_either_kernel_is_launched_by_the_library(by_library: list[Launch]) -> None:
    check(by_library[-1], LARGE)
    assert by_library[-1].kernel.endswith("_n16")
    assert {launch.kernel.endswith("_n16_small") for launch in by_library} == {False, True}


# Faults that are planted in the PTX, or in its launch.

SMALL = ScanCase("small", batch=2, channels=35, length=70, states=13, reverse=False, dtype="float16")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launch]:
    """Launches of both kernels, in which channels, length and states end within a block, a tile, a lane."""
    if reason := tensorrt_stubs.missing():
        pytest.skip(reason)
    ((large, small),) = ptx_launches.by_tensorrt([SMALL], tmp_path_factory.mktemp("both"))
    check(large, SMALL)
    check(small, SMALL)
    return {"n16": large, "n16_small": small}


def planted(launch: Launch, pattern: str, into: str, place: int = 0) -> Launch:
    """The launch with the `place`-th match of the pattern in its kernel replaced."""
    start = launch.ptx.index(f".entry {launch.kernel}(")
    end = launch.ptx.index("\n}\n", start)
    found = list(re.finditer(pattern, launch.ptx[start:end]))[place]
    first, last = start + found.start(), start + found.end()
    return replace(launch, ptx=launch.ptx[:first] + found.expand(into) + launch.ptx[last:])


DIFFERS = "off by up to"
SHARED = r"(ld\.shared\.v4\.f32 .*\[%rd\d+)\+(\d+)\]"
FAULTS: dict[str, tuple[tuple[object, ...], str]] = {
    "a wrong offset in shared memory": ((SHARED, r"\1+16]"), f"{DIFFERS}|never written"),
    "one that is not aligned": ((SHARED, r"\1+4]"), "no multiple of 16"),
    "one past the end": ((SHARED, r"\1+65536]"), "outside of shared memory"),
    "a wrong element of an input": (
        (r"(ld\.global\.u16\s+%\w+, \[%rd\d+)\+?\d*\]", r"\1+2]", 1),
        "outside of all|off by",
    ),
    "a wrong element of the output": ((r"(st\.global\.u16 \s*\[%rd\d+)\+?\d*\]", r"\1+2]"), "second time|outside of"),
    "no barrier at first": ((r"bar\.sync\s+0;", ""), "shared memory that"),
    "no barrier at last": ((r"bar\.sync\s+0;", "", 1), "shared memory that"),
    "swapped operands of a sum": (
        (r"sub\.s32 (.*), (%r\d+), (%r\d+);", r"sub.s32 \1, \3, \2;"),
        "outside|off|no thread",
    ),
    "swapped factor and term": ((r"fma\.rn\.f32 (.*), (%f\d+), (%f\d+);", r"fma.rn.f32 \1, \3, \2;", 40), DIFFERS),
    "swapped choices": ((r"selp\.f32 (.*), (%f\d+), (%f\d+), ", r"selp.f32 \1, \3, \2, "), DIFFERS),
    "a predicate the other way round": ((r"@(%p\d+) bra", r"@!\1 bra", 3), "outside of all|off by"),
    "a bound that lets one too many in": ((r"setp\.ge\.s32", "setp.gt.s32", 0), "outside of all"),
    "a shuffle of other lanes": ((r"mov\.u32 (\s*%r\d+), 2;", r"mov.u32 \1, 4;"), DIFFERS),
    "an exponential of the wrong state": ((r"(ex2\.approx\.ftz\.f32 %f\d+), (%f\d+);", r"\1, %f1;", 20), DIFFERS),
    "a loop that ends early": ((r"setp\.lt\.s32 ", "setp.gt.s32 ", -1), "no thread writes|off by"),
    "an instruction that is not known": ((r"rcp\.approx\.ftz", "rsqrt.approx.ftz"), "rsqrt.* is not known here"),
}


@pytest.mark.parametrize("kernel", ["n16", "n16_small"])
@pytest.mark.parametrize(("fault", "says"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found(fault: tuple[str, str, int], says: str, kernel: str, both: dict[str, Launch]) -> None:
    with pytest.raises((PtxError, AssertionError), match=says) as caught:
        check(planted(both[kernel], *fault), SMALL)
    if caught.type is PtxError and "no thread writes" not in str(caught.value):
        assert re.match(r"line \d+: ", str(caught.value))


@pytest.mark.parametrize("kernel", ["n16", "n16_small"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": (1, 3, 1)}, "no thread writes"),
        ({"grid": (3, 3, 1)}, "outside of all tensors"),
        ({"block": (256, 1, 1)}, "at most 128 threads"),
        ({"block": (96, 1, 1)}, "never written"),
    ],
)
def test_a_wrong_launch_is_found(
    change: dict[str, tuple[int, ...]], says: str, kernel: str, both: dict[str, Launch]
) -> None:
    with pytest.raises(PtxError, match=says):
        check(replace(both[kernel], **change), SMALL)


def test_swapped_arguments_are_found(both: dict[str, Launch]) -> None:
    launch = both["n16_small"]
    for first, second in ((0, 1), (3, 4), (8, 9), (8, 11), (0, 11)):
        swapped = list(launch.arguments)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        with pytest.raises((PtxError, AssertionError)):
            check(replace(launch, arguments=tuple(swapped)), SMALL)
    with pytest.raises(PtxError, match="takes 12 arguments, not 11"):
        check(replace(launch, arguments=launch.arguments[:-1]), SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["n16", "n16_small"])
def test_leaving_out_nearly_any_instruction_is_found(kernel: str, both: dict[str, Launch]) -> None:
    """The others do no harm: zeros for channels that no one stores, branches around what has bounds of its own."""
    launch = both[kernel]
    lines = launch.ptx.splitlines()
    start = next(i for i, line in enumerate(lines) if f".entry {launch.kernel}(" in line)
    body = range(start, lines.index("}", start))
    instructions = [i for i in body if re.match(r"\t(@|[a-z]).*;$", lines[i])][::4]
    spared = []
    for i in instructions:
        without = "\n".join([*lines[:i], "", *lines[i + 1 :]])
        try:
            check(replace(launch, ptx=without), SMALL)
        except (PtxError, AssertionError):
            continue
        spared.append(f"{i + 1}: {lines[i].strip()}")
    assert len(instructions) > 200
    assert len(spared) <= 0.06 * len(instructions), spared
