"""The interpreter that the scan's PTX is executed with: its arithmetic, its threads, and that it stops at a fault."""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np
import pytest
from ptx_on_cpu import Global, PtxError, arithmetic, launch

KERNEL = """.version 8.0
.visible .entry k(
	.param .u64 k_param_0,
	.param .u32 k_param_1,
	.param .u64 k_param_2
)
.maxntid 64, 1, 1
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .f32 	%f<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
	.shared .align 16 .b8 words[256];

	ld.param.u64 	%rd1, [k_param_0];
	ld.param.u32 	%r9, [k_param_1];
	ld.param.u64 	%rd2, [k_param_2];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	shl.b32 	%r3, %r2, 6;
	add.s32 	%r3, %r3, %r1;
	mul.wide.s32 	%rd3, %r3, 4;
	add.s64 	%rd1, %rd1, %rd3;
	add.s64 	%rd2, %rd2, %rd3;
	mul.wide.s32 	%rd4, %r1, 4;
	mov.u64 	%rd5, words;
	add.s64 	%rd5, %rd5, %rd4;
	ld.global.u32 	%r4, [%rd1];
{body}
	ret;
}}
"""
STORE = "\tst.global.u32 \t[%rd2], %r4;"


def run(body: str, u: np.ndarray | None = None, number: int = 7) -> np.ndarray:
    """What a kernel of two blocks makes of 128 words: in thread t of them, %r4 is u[t], [%rd2] is y[t]."""
    u = np.arange(128, dtype=np.uint32) if u is None else u
    memory = Global()
    arguments = [memory.input("u", u), number, memory.output("y", u.nbytes)]
    launch(KERNEL.format(body=body), "k", (2, 1, 1), (64, 1, 1), arguments, memory)
    return memory.result("y").view(u.dtype)


def bits(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def test_fma_is_rounded_once() -> None:
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    random = np.random.default_rng(0)

    def numbers(count: int, low: float, high: float) -> np.ndarray:
        return (random.choice([-1, 1], count) * np.exp2(random.uniform(low, high, count))).astype(np.float32)

    usual = [numbers(20_000, -3, 3) for _ in range(3)]
    tiny = [numbers(20_000, -75, -55), numbers(20_000, -75, -55), numbers(20_000, -149, -120)]
    # Products that are a tie of float32, with something beside them that float64 has no room for.
    ties = [np.full(20_000, 1 + 2.0**-12, np.float32), np.full(20_000, 1 + 2.0**-12, np.float32)]
    ties.append(numbers(20_000, -120, -40))
    odd = np.array([0.0, -0.0, 1.0, np.inf, -np.inf, np.nan, 3e38, 1e-45], np.float32)
    special = [each.ravel() for each in np.meshgrid(odd, odd, odd)]
    with np.errstate(all="ignore"):
        for a, b, c in (usual, tiny, ties, special):
            expected = np.array([fmaf(*map(float, each)) for each in zip(a, b, c, strict=True)], np.float32)
            got = arithmetic.fma(a, b, c)
            same = (bits(got) == bits(expected)) | (np.isnan(got) & np.isnan(expected))
            assert same.all()
        a, b, c = ties
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
        assert (twice != arithmetic.fma(a, b, c)).any()  # the ties do tell them apart


def test_exponential_and_reciprocal_are_rounded_correctly_and_flush_subnormals() -> None:
    x = np.linspace(-130, 127, 100_001).astype(np.float32)
    x = x[np.abs(x) > 2.0**-126]
    exact = x.astype(np.longdouble)
    for got, expected in ((arithmetic.ex2(x), np.exp2(exact)), (arithmetic.rcp(x), 1 / exact)):
        normal = np.abs(expected) >= 2.0**-126
        assert (np.abs(got - expected)[normal] <= 0.5001 * np.spacing(np.abs(got[normal]))).all()
        assert (got[~normal] == 0).all()
    with np.errstate(divide="ignore"):
        assert np.isinf(arithmetic.rcp(np.array([0.0, -0.0, 1e-40], np.float32))).all()


def test_integers_wrap_shift_and_insert_as_ptx_says() -> None:
    x = np.array([0x80000001, 0x7FFFFFFF, 5], np.uint32)
    places = np.array([31, 32, 200], np.uint32)
    np.testing.assert_array_equal(arithmetic.shl(x, places), [0x80000000, 0, 0])
    np.testing.assert_array_equal(arithmetic.shr(x, places), [1, 0, 0])
    np.testing.assert_array_equal(arithmetic.shr(x.view(np.int32), places), [-1, 0, 0])
    ones, none = np.full(3, 0xFFFFFFFF, np.uint32), np.zeros(3, np.uint32)
    position, length = np.array([3, 0, 40], np.uint32), np.array([29, 32, 4], np.uint32)
    np.testing.assert_array_equal(arithmetic.bfi(ones, none, position, length), [0xFFFFFFF8, 0xFFFFFFFF, 0])
    np.testing.assert_array_equal(arithmetic.bfi(none, ones, position, length), [7, 0, 0xFFFFFFFF])


def test_threads_part_ways_and_meet_again() -> None:
    # Each adds its number as often as its lane's last two bits say; a shuffle then takes whole warps.
    body = f"""
	and.b32 	%r5, %r1, 3;
	mov.u32 	%r6, 0;
$L__1:
	setp.ge.u32 	%p1, %r6, %r5;
	@%p1 bra 	$L__2;
	add.s32 	%r4, %r4, %r3;
	add.s32 	%r6, %r6, 1;
	bra 	$L__1;
$L__2:
	@!%p1 bra 	$L__3;
	shfl.sync.bfly.b32 	%r4|%p2, %r4, 1, 31, -1;
$L__3:
	setp.eq.s32 	%p3, %r5, 0;
	@%p3 add.s32 	%r4, %r4, 1000;
{STORE}"""
    t = np.arange(128)
    expected = (t + t * (t % 4))[t ^ 1] + np.where(t % 4 == 0, 1000, 0)
    np.testing.assert_array_equal(run(body), expected)


def test_a_barrier_orders_what_threads_of_a_block_write_and_read() -> None:
    body = f"""
	st.shared.u32 	[%rd5], %r4;
	bar.sync 	0;
	sub.s32 	%r6, 63, %r1;
	mul.wide.s32 	%rd6, %r6, 4;
	mov.u64 	%rd7, words;
	add.s64 	%rd7, %rd7, %rd6;
	ld.shared.u32 	%r4, [%rd7];
{STORE}"""
    np.testing.assert_array_equal(run(body), np.concatenate([np.arange(64)[::-1], np.arange(64, 128)[::-1]]))


READ_NEXT = (
    "\txor.b32 \t%r6, %r1, 1;\n\tmul.wide.s32 \t%rd6, %r6, 4;\n\tmov.u64 \t%rd7, words;\n\tadd.s64 \t%rd7, %rd7, %rd6;"
)
HALF = "\tsetp.lt.u32 \t%p1, %r1, 32;\n\tand.b32 \t%r8, %r1, 1;\n\tsetp.eq.s32 \t%p2, %r8, 0;"
FAULTS = {
    "reads past the end": ("ld.global.u32 %r4, [%rd1+4];", "reads outside of all tensors, 0 bytes after the end of u"),
    "reads before the start": ("ld.global.u32 %r4, [%rd1+-8];", "reads outside of all tensors, 8 bytes before u"),
    "reads what is not aligned": ("ld.global.u32 %r4, [%rd1+2];", "reads 4 bytes at an address that is no multiple"),
    "writes an input": ("st.global.u32 [%rd1], %r4;", "writes byte 0 of u"),
    "reads the output": ("ld.global.u32 %r4, [%rd2];", "reads byte 0 of y"),
    "writes twice": ("st.global.u32 [%rd2], %r4;", "writes byte 0 of y a second time"),
    "never writes": ("ret;", "no thread writes 512 bytes of y, at 0 and on"),
    "reads what was never written": ("ld.shared.u32 %r4, [%rd5];", "shared memory that was never written"),
    "leaves shared memory": ("st.shared.u32 [%rd5+4], %r4;", "writes outside of shared memory"),
    "reads without a barrier": (
        f"st.shared.u32 [%rd5], %r4;\n{READ_NEXT}\nld.shared.u32 %r4, [%rd7];",
        "reads shared memory that another thread writes without a barrier between",
    ),
    "writes without a barrier": (
        f"st.shared.u32 [%rd5], %r4;\nbar.sync 0;\n{READ_NEXT}\nld.shared.u32 %r4, [%rd7];\nst.shared.u32 [%rd5], %r4;",
        "writes shared memory that another reads without a barrier between",
    ),
    "writes to one place": ("mov.u64 %rd7, words;\nst.shared.u32 [%rd7], %r4;", "two threads write the same"),
    "loses a warp at a barrier": (f"{HALF}\n@%p1 bra $L__9;\nbar.sync 0;\n$L__9:\n", "wait at this barrier"),
    "has two barriers": (
        f"{HALF}\n@%p1 bra $L__8;\nbar.sync 0;\nbra $L__9;\n$L__8:\nbar.sync 0;\n$L__9:",
        "wait at this",
    ),
    "loses lanes at a shuffle": (
        f"{HALF}\n@%p2 bra $L__9;\nshfl.sync.bfly.b32 %r4|%p3, %r4, 1, 31, -1;\n$L__9:",
        "some lanes of a warp do not come to this shuffle",
    ),
    "does not end": ("$L__9:\nbra $L__9;", "k does not end"),
    "takes an unknown instruction": ("vote.sync.any.pred %p1, %p1, -1;", "vote.* is not known here"),
    "mixes widths": ("mov.u32 %r4, %rd1;", "width of %rd1"),
    "takes an argument of another type": ("ld.param.u64 %rd1, [k_param_1];", "argument 1 is u32, not u64"),
}


@pytest.mark.parametrize(("body", "says"), FAULTS.values(), ids=FAULTS)
def test_it_stops_at_a_fault_and_names_its_line(body: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx_on_cpu.machine._MOST_BLOCKS", 100)
    lines = "\n".join(f"\t{line.strip()}" if not line.endswith(":") else line for line in body.splitlines())
    with pytest.raises(PtxError, match=says) as caught:
        run(f"{lines}\n{STORE}")
    assert str(caught.value).startswith("line ") or says in ("k does not end", FAULTS["never writes"][1])


def test_there_must_be_such_a_kernel() -> None:
    with pytest.raises(PtxError, match="there is no kernel l"):
        launch(KERNEL.format(body=""), "l", (1, 1, 1), (64, 1, 1), [], Global())
