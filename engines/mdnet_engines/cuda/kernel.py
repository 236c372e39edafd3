"""SelectiveScan for CUDA: one source, its PTX, and which of its kernels serves which call.

    kernel = kernel_name(reverse=False, dtype="float16", states=16)     # an entry point of ptx()

The PTX is committed, so nobody needs a compiler: the driver turns it into code for any GPU from compute capability 8.0
on. Whoever changes `selective_scan.cu` makes it anew, with the extra
`mdnet[cuda-dev]`:

    python -m mdnet_engines.cuda.kernel

A launch has `THREADS` threads a block and a grid of (batch, ⌈channels / channels_per_block(kernel)⌉, 1), no dynamic
shared memory, and the arguments `ARGUMENTS`: pointers to contiguous tensors, shaped as in
`mdnet_engines.ops.selective_scan`, and three int32. A, D and delta_bias are float32; the other tensors are all of the
kernel's type. A sequence is shorter than 2²⁵.

Version 2 of the operator (`mdnet_engines.ops.scan_v2`) has kernels of its own, one for all of its variants, with the
arguments `ARGUMENTS_V2`: pointers to what is missing are null, `softplus` is 1 or 0. There `channels` are those of one
group, and the grid is (batch, ⌈channels / 32⌉, groups).

For the usual 16 states version 1 has a second kernel for small launches, with four times as many blocks. Either takes
any batch. `is_small` says which one the native library chooses; TensorRT times both when it builds an engine.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from mdnet_engines.errors import MDNetError, first_line, printable
from mdnet_engines.ops.scan_shapes import INPUTS, INPUTS_V2

THREADS = 128
CHANNELS_PER_BLOCK = 32
SMALL_CHANNELS_PER_BLOCK = 8
MAX_STATES = 64
# Two blocks for each of an A100's 108 multiprocessors: beyond, the other kernel has fewer instructions to issue on the
# busiest one (docs/scan-kernels.md).
SMALL_BLOCKS = 216
ARGUMENTS = (*INPUTS, "channels", "length", "states", "y")
ARGUMENTS_V2 = (*INPUTS_V2, "channels", "length", "states", "groups", "softplus", "y", "h_last")

COMPILED_FOR = "compute_80"  # the oldest with bfloat16; newer GPUs run it just as well
# NVRTC declares the newest PTX ISA that it knows, and a driver refuses one newer than its own. What it writes for
# compute_80 is still in the language of 8.0, as ptxas confirms in the tests: any driver of CUDA 12 may load it.
PTX_ISA = "8.0"

Dtype = Literal["float32", "float16", "bfloat16"]
"""Of u, delta, B, C, z and y."""

_DIRECTORY = Path(__file__).parent
_SOURCE = _DIRECTORY / "selective_scan.cu"
_PTX = _DIRECTORY / "selective_scan.ptx"
_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CAPACITIES = (4, 16, MAX_STATES)  # states that a kernel has registers for
_SMALL_CAPACITY = 16


def kernel_name(*, reverse: bool, dtype: Dtype, states: int, small: bool = False, version: Literal[1, 2] = 1) -> str:
    """The entry point for activations of `dtype` and `states` states a channel; `small`: that for small launches.

    `version` is the operator's; 2 has none for small launches.

    Raises:
        MDNetError: there is no such kernel.
    """
    if dtype not in _TYPES:
        raise MDNetError(f"the CUDA scan has no kernel for {dtype!r}; it has {', '.join(_TYPES)}")
    if not 1 <= states <= MAX_STATES:
        raise MDNetError(f"the CUDA scan has no kernel for {states} states a channel; it takes 1 to {MAX_STATES}")
    capacity = next(capacity for capacity in _CAPACITIES if states <= capacity)
    if small and (capacity != _SMALL_CAPACITY or version == 2):
        of_version = " in version 2" if version == 2 else ""
        raise MDNetError(f"the CUDA scan has no kernel for small launches of {states} states a channel{of_version}")
    scan = "selective_scan2" if version == 2 else "selective_scan"
    return f"{scan}_{'reverse' if reverse else 'forward'}_{_TYPES[dtype]}_n{capacity}{'_small' * small}"


def has_small(states: int) -> bool:
    """Whether there is a second kernel, for small launches, for so many states a channel."""
    return next((capacity for capacity in _CAPACITIES if states <= capacity), None) == _SMALL_CAPACITY


def is_small(batch: int, channels: int, states: int) -> bool:
    """Whether a launch of these sizes should take the kernel for small ones."""
    return has_small(states) and batch * -(-channels // SMALL_CHANNELS_PER_BLOCK) <= SMALL_BLOCKS


def channels_per_block(kernel: str) -> int:
    """What a block of an entry point takes: the grid's second size follows from it."""
    return SMALL_CHANNELS_PER_BLOCK if kernel.endswith("_small") else CHANNELS_PER_BLOCK


def source() -> str:
    """The CUDA C++ source; it includes nothing."""
    return _SOURCE.read_text(encoding="utf-8")


def ptx() -> str:
    """The committed PTX: all kernels, for compute capability 8.0 and later."""
    return _PTX.read_text(encoding="utf-8")


def compile_ptx(arch: str = COMPILED_FOR) -> str:
    """Compile the source with NVRTC, which needs neither a GPU nor a driver; `arch` is a virtual one, `compute_90`.

    Raises:
        MDNetError: NVRTC is not installed, does not know `arch`, or refuses the source.
    """
    nvrtc = _import_nvrtc()
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(source().encode(), _SOURCE.name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            raise MDNetError(f"NVRTC can't compile {_SOURCE.name} for {arch}: {_first_error(bytes(log))}")
        text = bytearray(_checked(nvrtc, nvrtc.nvrtcGetPTXSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetPTX(program, text))
        return text.rstrip(b"\0").decode()
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def committed_ptx(compiled: str) -> str:
    """What `compile_ptx` gave, as it is committed: says what it was made from and by; declares `PTX_ISA`."""
    made_by = re.search(r"\bV(\d+(?:\.\d+)+)", compiled)  # NVRTC's own comment; its API leaves the patch level out
    digest = hashlib.sha256(source().encode()).hexdigest()
    header = f"// sha256 of {_SOURCE.name}: {digest}; NVRTC {made_by[1] if made_by else 'unknown'}\n"
    body = re.sub(r"^\.version .*$", f".version {PTX_ISA}", compiled, count=1, flags=re.MULTILINE)
    return header + body.rstrip() + "\n"


def main() -> None:
    """Rewrite the committed PTX from the source."""
    text = committed_ptx(compile_ptx())
    _PTX.write_text(text, encoding="utf-8", newline="\n")
    print(f"{_PTX.name}: {len(text) / 1e3:.0f} kB; {text.splitlines()[0].removeprefix('// ')}")


def _import_nvrtc() -> Any:
    """NVRTC's bindings; they find the library only when it is first called."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as error:  # a missing package is an ImportError, a missing library is not
        raise MDNetError(
            f"compiling the CUDA scan needs NVRTC, of the extra mdnet[cuda-dev] ({first_line(error)})"
        ) from error
    return nvrtc


def _checked(nvrtc: Any, answer: tuple[Any, ...]) -> Any:
    """The value that comes with an NVRTC status, which must be success."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise MDNetError(f"NVRTC failed: {status.name}")
    return values[0] if values else None


def _first_error(log: bytes) -> str:
    lines = log.rstrip(b"\0").decode(errors="replace").splitlines() or ["no reason given"]
    return printable(next((line for line in lines if "error" in line), lines[0]).strip())


if __name__ == "__main__":
    main()
