"""What the device is, and the ceilings that other stages' figures are held against: measured, not read from a sheet."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable

import torch

from gpu.clock import Device, quiet_fp32
from gpu.context import CheckFailed, Context, Work
from gpu.results import Figure

CEILINGS = "ceilings.json"
_CLOCK_KHZ, _MULTIPROCESSORS = 13, 16  # CUdevice_attribute
_CHAINS, _UNROLLED, _ROUNDS, _THREADS = 8, 8, 256, 256


def run(context: Context) -> None:
    """Facts; copy bandwidth, rates of matrix products and of exponentials."""
    found: dict[str, float] = {}

    def ceiling(unit: str, scale: float, key: str, measure: Callable[[], float]) -> dict[str, Figure]:
        value = measure()
        if not value > 0:
            raise CheckFailed(f"measured {value}")
        found[key] = value
        (context.scratch / CEILINGS).write_text(json.dumps(found), encoding="utf-8")
        return {unit: value / scale}

    device, sizes = context.device, context.sizes
    quiet_fp32()

    def product(dtype: torch.dtype) -> tuple[str, Work]:
        name = str(dtype).removeprefix("torch.")
        measure = functools.partial(matmul_rate, device, sizes.matmul, dtype)
        return f"matrix product, {name}", lambda: ceiling("TFLOP/s", 1e12, name, measure)

    def bytes_copied() -> dict[str, Figure]:
        return ceiling("GB/s, read and written", 1e9, "bytes", lambda: copy_rate(device, sizes.copy_bytes))

    def exponentials() -> dict[str, Figure]:
        return ceiling("G/s", 1e9, "exponentials", lambda: exponential_rate(device, sizes.copy_bytes))

    works: list[tuple[str, Work]] = [("facts", lambda: facts(device)), ("copy bandwidth", bytes_copied)]
    works += [product(torch.float16), product(torch.float32), ("exponentials", exponentials)]
    context.expect(*(name for name, _ in works))
    for name, work in works:
        context.attempt(name, work)


def ceilings(context: Context) -> dict[str, float]:
    """By `run`: `bytes`, `float16` and `float32` operations, `exponentials` a second; what failed is left out."""
    file = context.scratch / CEILINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def facts(device: Device) -> dict[str, Figure]:
    """Name, compute capability, driver and sizes of the device."""
    if not device.is_cuda:
        return {"name": platform.processor() or platform.machine(), "cores": os.cpu_count() or 1}
    from mdnet_engines.system.gpu import visible_gpu

    gpu, properties = visible_gpu(), torch.cuda.get_device_properties(0)
    if gpu is None:
        raise CheckFailed("the driver shows no GPU, PyTorch does")
    return {
        "name": gpu.name,
        "compute capability": gpu.sm,
        "driver": _driver_version(),
        "CUDA of the driver": gpu.driver,
        "CUDA of PyTorch": str(torch.version.cuda),
        "multiprocessors": _attribute(_MULTIPROCESSORS),
        "MHz at most": _attribute(_CLOCK_KHZ) / 1e3,
        "memory, GiB": properties.total_memory / 2**30,
    }


def copy_rate(device: Device, size: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes on the device."""
    source = torch.ones(size, dtype=torch.uint8, device=device.kind)
    target = torch.empty_like(source)
    return 2 * size / device.measure(lambda: target.copy_(source), seconds=0.5)


def matmul_rate(device: Device, size: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two matrices of normal numbers, `size` on a side."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device.kind) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / device.measure(lambda: torch.matmul(a, b, out=out), seconds=1.0)


def exponential_rate(device: Device, size: int) -> float:
    """Exponentials a second: by a kernel of nothing else; on a CPU by PyTorch."""
    if not device.is_cuda:
        x = torch.zeros(size // 4)
        return len(x) / device.measure(lambda: torch.exp(x, out=x), seconds=0.1)
    from gpu.driver import Module

    blocks = 16 * _attribute(_MULTIPROCESSORS)
    out = torch.empty(blocks * _THREADS, device="cuda")
    module, stream = Module(exponentials_ptx()), torch.cuda.current_stream().cuda_stream
    arguments = [ctypes.c_void_p(out.data_ptr()), ctypes.c_int32(_ROUNDS)]
    seconds = device.measure(
        lambda: module.launch("exponentials", (blocks, 1, 1), _THREADS, arguments, stream), seconds=0.2
    )
    return out.numel() * _CHAINS * _UNROLLED * _ROUNDS / seconds


def exponentials_ptx() -> str:
    """A kernel of chains of `ex2.approx`, the scan's exponential, which are added up at the end."""
    chains = range(_CHAINS)
    lines = [
        ".version 8.0",
        ".target sm_80",
        ".address_size 64",
        ".visible .entry exponentials(.param .u64 out, .param .u32 rounds)",
        "{",
        f".reg .f32 %x<{_CHAINS}>; .reg .u32 %i, %n, %t, %b, %d; .reg .u64 %o, %s; .reg .pred %more;",
        "ld.param.u64 %o, [out]; cvta.to.global.u64 %o, %o; ld.param.u32 %n, [rounds];",
        "mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %d, %ntid.x; mad.lo.u32 %b, %b, %d, %t; mov.u32 %i, 0;",
        *(f"add.u32 %t, %t, 1; cvt.rn.f32.u32 %x{k}, %t; neg.f32 %x{k}, %x{k};" for k in chains),
        "again:",
        *(f"ex2.approx.ftz.f32 %x{k}, %x{k};" for _ in range(_UNROLLED) for k in chains),
        "add.u32 %i, %i, 1; setp.lt.u32 %more, %i, %n; @%more bra again;",
        *(f"add.f32 %x0, %x0, %x{k};" for k in chains if k),
        "mul.wide.u32 %s, %b, 4; add.u64 %o, %o, %s; st.global.f32 [%o], %x0;",
        "ret;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _attribute(number: int) -> int:
    value = ctypes.c_int()
    cuda = ctypes.CDLL("libcuda.so.1")
    if status := cuda.cuDeviceGetAttribute(ctypes.byref(value), number, torch.cuda.current_device()):
        raise CheckFailed(f"cuDeviceGetAttribute({number}) failed with {status}")
    return value.value


def _driver_version() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return (done.stdout.split() or ["unknown"])[0]
