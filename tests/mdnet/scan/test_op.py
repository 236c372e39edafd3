"""The PyTorch operator, on the native kernel and on the loop, against the float64 reference."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scan_cases import (
    EVERY_CASE,
    REFUSED,
    REFUSED_CASE,
    SCAN_CASES,
    Refusal,
    ScanCase,
    assert_close,
    make_inputs,
    reference_scan,
)
from torch import Tensor, nn

from mdnet.scan import loop as scan_loop
from mdnet.scan import mamba_ssm as scan_mamba
from mdnet.scan import op as scan_op
from mdnet.scan import selective_scan, selective_scan_backward
from mdnet.scan.native_call import _rows
from mdnet_engines.ops import native

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
SMALL = ScanCase("small", batch=2, channels=3, length=5, states=4, reverse=False)


def tensors(case: ScanCase, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The case's inputs, views as views."""
    inputs = make_inputs(case)
    found = []
    for name in NAMES:
        array = np.asarray(inputs[name])
        if array.dtype.name == "bfloat16":  # NumPy has it from a package that PyTorch does not know
            found.append(torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16))
        else:
            found.append(torch.from_numpy(array))
    return [tensor.to(dtype) for tensor in found] if dtype else found


@pytest.fixture(params=["native", "loop", "mamba-ssm"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every implementation behind the operator; mamba-ssm's kernel has a stand-in that insists on what it documents."""
    if request.param != "native":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("mdnet was installed without its native library")
    if request.param == "mamba-ssm":
        monkeypatch.setattr(scan_mamba, "available", lambda u, _: u.dtype != torch.float64)
        monkeypatch.setattr(scan_mamba, "_kernel", lambda: MambaKernel)
    return request.param


class MambaKernel:
    """What stands in for mamba-ssm's `SelectiveScanFn`: its signatures, and the types that its CUDA code checks."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Tensor:
        assert D is not None
        assert z is not None
        assert delta_bias is not None
        assert delta_softplus
        assert not return_last_state
        assert {tensor.dtype for tensor in (delta, B, C, z)} == {u.dtype}
        assert {tensor.dtype for tensor in (A, D, delta_bias)} == {torch.float32}
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        ctx.save_for_backward(*inputs)
        return naive([tensor.float() for tensor in inputs], reverse=False).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        assert dout.dtype == ctx.saved_tensors[0].dtype
        return (*scan_loop.scan_backward(dout, *ctx.saved_tensors, reverse=False)[:8], None, None)


def test_mamba_ssm_is_used_on_cuda_alone_and_only_for_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda(NamedTuple):
        dtype: torch.dtype
        is_cuda: bool = True
        device: torch.device = torch.device("cuda")

    states = torch.zeros(3, 16)
    assert not scan_mamba.available(Cuda(torch.float32), states)  # type: ignore[arg-type] # not installed here
    monkeypatch.setattr(scan_mamba, "problem", lambda _: "")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert scan_mamba.available(Cuda(dtype), states)  # type: ignore[arg-type]
    assert not scan_mamba.available(Cuda(torch.float64), states)  # type: ignore[arg-type]
    assert not scan_mamba.available(Cuda(torch.float32), torch.zeros(3, 257))  # type: ignore[arg-type]
    assert not scan_mamba.available(torch.zeros(1, 3, 5), states)


INTERFACE = """
import torch

{imported}

class SelectiveScanFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        {checked}
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return rest[0]
"""
HARD = INTERFACE.format(imported="import selective_scan_cuda", checked="")
SOFT = INTERFACE.format(
    imported="try:\n    import selective_scan_cuda\nexcept ImportError:\n    selective_scan_cuda = None",
    checked="if selective_scan_cuda is None: raise RuntimeError('selective_scan_cuda is not installed.\\nReinstall')",
)
EXTENSION = """
from mdnet.scan import loop
def fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    assert delta_softplus
    return None, None, {result}
"""
GOOD = EXTENSION.format(result="loop.scan(u, delta, A, B, C, D, z, delta_bias, reverse=False)[0]")


@pytest.mark.parametrize("interface", [HARD, SOFT], ids=["hard import", "soft import"])
@pytest.mark.parametrize(
    ("extension", "says"),
    [
        (GOOD, ""),
        (None, "selective_scan_cuda"),
        ("def fwd(*_): raise RuntimeError('CUDA error: no kernel image\\nmore')", "no kernel image"),
        (EXTENSION.format(result="u.new_full(u.shape, float('nan'))"), "its result is wrong"),
        ("raise ImportError('undefined symbol: x')", "symbol"),
    ],
    ids=["whole", "not built", "for another GPU", "wrong", "for another PyTorch"],
)
def test_mamba_ssm_is_available_where_its_kernel_runs_alone(
    interface: str, extension: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mamba_ssm" / "ops"
    package.mkdir(parents=True)
    (package / "selective_scan_interface.py").write_text(interface)
    if extension is not None:
        (tmp_path / "selective_scan_cuda.py").write_text(extension)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scan_mamba, "_kernel", scan_mamba._kernel.__wrapped__)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            why = scan_mamba.problem.__wrapped__(torch.device("cpu"))
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
            del sys.modules[name]
    assert bool(why) == bool(says)
    assert [str(each.message).partition(": ")[2] for each in told] == ([why.partition(": ")[2]] if why else [])
    if interface == SOFT and says == "symbol":
        says = "selective_scan_cuda is not installed"
    assert says in why
    assert "\n" not in why


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: ScanCase, host: str) -> None:
    inputs = tensors(case)
    got = selective_scan(*inputs, case.reverse)
    assert got.dtype == inputs[0].dtype
    assert got.is_contiguous()
    expected = reference_scan(**make_inputs(case), reverse=case.reverse)
    assert_close(got.double().numpy(), expected, case.dtype)


def naive(tensors: list[Tensor], reverse: bool) -> Tensor:
    """The formula in differentiable operations, to be differentiated by autograd."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    dt = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    y: list[Tensor] = []
    for t in reversed(range(u.shape[2])) if reverse else range(u.shape[2]):
        h = torch.exp(dt[:, :, t, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(-1))
    return (torch.stack(y[::-1] if reverse else y, dim=2) + D[:, None] * u) * torch.nn.functional.silu(z)


# Very negative steps have gradients below float32's smallest number: nothing to compare there.
DIFFERENTIABLE = [case for case in SCAN_CASES if case.delta_mean > -100]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_agree_with_autograd_through_the_formula(case: ScanCase, host: str) -> None:
    wide = [tensor.double().requires_grad_() for tensor in tensors(case)]
    y = naive(wide, case.reverse)
    upstream = torch.from_numpy(np.random.default_rng(1).standard_normal(y.shape))
    expected = torch.autograd.grad(y, wide, upstream)
    leaves = [tensor.requires_grad_() for tensor in tensors(case)]
    got = torch.autograd.grad(selective_scan(*leaves, case.reverse), leaves, upstream.float())
    for name, mine, exact in zip(NAMES, got, expected, strict=True):
        assert mine.dtype == torch.float32
        # Sums of up to batch × channels × length products of float32: ten times what the forward pass is allowed.
        assert (mine - exact).abs().max() <= 3e-5 * exact.abs().max(), name


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [5, 66])  # one tile of the kernel, and two
def test_gradient_is_exact(reverse: bool, length: int, host: str) -> None:
    case = ScanCase("gradcheck", batch=2, channels=3, length=length, states=2, reverse=reverse)
    inputs = [tensor.requires_grad_() for tensor in tensors(case, torch.float64)]
    fast = length > 5  # all of a long case's Jacobian takes minutes: one random direction of it
    assert torch.autograd.gradcheck(lambda *args: selective_scan(*args, reverse), inputs, fast_mode=fast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_gradients_rounded_once(dtype: torch.dtype, host: str) -> None:
    case = ScanCase("half", batch=2, channels=5, length=40, states=4, reverse=False)
    rounded = [tensor.to(dtype) for tensor in tensors(case)]
    grad = torch.randn(2, 5, 40).to(dtype)
    got = selective_scan_backward(grad, *rounded, False)
    expected = selective_scan_backward(grad.float(), *(tensor.float() for tensor in rounded), False)
    for mine, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, exact.to(dtype), rtol=0, atol=0)


def test_types_may_differ(host: str) -> None:
    """Half activations with float32 B and C: nothing is rounded on the way in."""
    case = ScanCase("mixed", batch=2, channels=5, length=20, states=4, reverse=False)
    inputs = dict(zip(NAMES, tensors(case), strict=True))
    for name in ("u", "delta", "z"):
        inputs[name] = inputs[name].half()
    got = selective_scan(**inputs)
    expected = reference_scan(**{name: tensor.double().numpy() for name, tensor in inputs.items()})
    assert got.dtype == torch.float16
    assert_close(got.double().numpy(), expected, "float16")


@pytest.mark.parametrize("reverse", [False, True])
def test_any_layout_is_taken(reverse: bool, host: str) -> None:
    case = ScanCase("layouts", batch=2, channels=6, length=10, states=4, reverse=reverse)
    inputs = dict(zip(NAMES, tensors(case), strict=True))
    expected = selective_scan(**inputs, reverse=reverse)
    both = torch.cat([inputs["u"], inputs["z"]], dim=1)
    inputs["u"], inputs["z"] = both.chunk(2, dim=1)  # as the mixer's input projection gives them
    inputs["B"] = inputs["B"].mT.contiguous().mT  # steps far apart
    inputs["C"] = inputs["C"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["A"] = inputs["A"].mT.contiguous().mT
    torch.testing.assert_close(selective_scan(**inputs, reverse=reverse), expected, rtol=0, atol=0)
    inputs["delta"] = inputs["delta"][:1].expand(2, -1, -1)  # a stride of 0
    same = selective_scan(**inputs, reverse=reverse)
    torch.testing.assert_close(same[:1], expected[:1], rtol=0, atol=0)


def test_a_view_whose_steps_are_side_by_side_is_not_copied() -> None:
    whole = torch.randn(2, 6, 10)
    view = whole[:, 2:4, 3:]
    assert _rows(view, torch.float32).data_ptr() == view.data_ptr()
    assert _rows(view.mT, torch.float32).data_ptr() != view.data_ptr()


@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_of_time_join(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(ScanCase("chunks", batch=2, channels=3, length=23, states=4, reverse=reverse))
    whole = scan_loop.scan(*inputs, reverse=reverse)
    state_bytes = 2 * 3 * 4 * 4
    monkeypatch.setattr(scan_loop, "_CHUNK_BYTES", 5 * state_bytes)
    torch.testing.assert_close(scan_loop.scan(*inputs, reverse=reverse), whole, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_operator_is_well_formed(reverse: bool, host: str) -> None:
    """Schema, fake, autograd registration and tracing, as PyTorch checks them."""
    inputs = [tensor.requires_grad_() for tensor in tensors(SMALL)]
    torch.library.opcheck(scan_op.selective_scan, (*inputs, reverse))


class TwoScans(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, *inputs: Tensor) -> Tensor:
        u, *others = inputs
        u = u * self.scale[:, None]
        return selective_scan(u, *others, False) + selective_scan(u, *others, True)


def test_compiles_without_graph_breaks() -> None:
    inputs = tensors(SMALL)
    module = TwoScans()
    compiled = torch.compile(module, fullgraph=True)
    expected, got = module(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(y.sum(), module.scale)[0] for y in (expected, got)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.fixture
def restore_threads() -> Callable[[], None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_changes_no_bit(host: str) -> None:
    case = ScanCase("threads", batch=3, channels=300, length=70, states=16, reverse=False)
    inputs, grad = tensors(case), torch.randn(3, 300, 70)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((selective_scan(*inputs), *selective_scan_backward(grad, *inputs, False)))
    if host != "native":
        pytest.skip("PyTorch's own sums depend on the number of threads")
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.name)
def test_what_makes_no_sense_is_refused_in_words(refusal: Refusal) -> None:
    inputs = refusal.spoil(make_inputs(REFUSED_CASE))
    with pytest.raises(ValueError, match=r".") as error:
        selective_scan(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for words in refusal.says:
        assert words in str(error.value)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
@pytest.mark.parametrize("name", NAMES)
def test_a_type_that_is_not_floating_point_is_refused(name: str, kind: torch.dtype) -> None:
    inputs = dict(zip(NAMES, tensors(SMALL), strict=True))
    with pytest.raises(TypeError, match=f"{name} is {kind}"):
        selective_scan(**{**inputs, name: inputs[name].to(kind)})


@pytest.mark.parametrize("name", NAMES[1:])
def test_tensors_of_another_device_are_refused(name: str) -> None:
    inputs = dict(zip(NAMES, tensors(SMALL), strict=True))
    with pytest.raises(ValueError, match=f"{name} is on meta, u on cpu"):
        selective_scan(**{**inputs, name: inputs[name].to("meta")})


def test_the_gradient_of_another_shape_is_refused() -> None:
    inputs = tensors(SMALL)
    with pytest.raises(ValueError, match=r"grad is \(2, 3, 4\)"):
        selective_scan_backward(torch.ones(2, 3, 4), *inputs, False)


def test_shapes_are_checked_before_a_compiled_graph_runs() -> None:
    inputs = dict(zip(NAMES, tensors(SMALL), strict=True))
    with pytest.raises(Exception, match="B is"):  # the compiler wraps what the operator raises
        torch.compile(selective_scan, fullgraph=True)(**{**inputs, "B": torch.ones(2, 9, 1)})


@pytest.mark.parametrize("reverse", [False, True])
def test_an_infinite_step_spoils_no_gradient_that_the_formula_leaves_finite(reverse: bool, host: str) -> None:
    case = ScanCase("infinite", batch=1, channels=2, length=6, states=5, reverse=reverse)
    inputs = tensors(case)
    inputs[1][0, 1, 3] = torch.inf
    leaves = [tensor.double().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad(naive(leaves, reverse).sum(), leaves)
    got = selective_scan_backward(torch.ones(1, 2, 6), *inputs, reverse)
    for name, mine, exact in zip(NAMES, got, expected, strict=True):
        assert not (torch.isnan(mine) & ~torch.isnan(exact)).any(), name


def test_a_state_that_dies_out_costs_no_more(host: str) -> None:
    """It decays below the smallest normal number, and is 0 from there on."""
    inputs = tensors(ScanCase("dying", batch=1, channels=16, length=400, states=16, reverse=False))
    inputs[0][..., 1:] = 0
    y = selective_scan(*inputs)
    smallest = torch.finfo(torch.float32).tiny
    if host == "loop":
        pytest.skip("PyTorch keeps subnormal numbers unless told otherwise")
    assert not ((y != 0) & (y.abs() < smallest)).any()
