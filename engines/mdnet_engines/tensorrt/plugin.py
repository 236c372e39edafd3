"""SelectiveScan for TensorRT 11: the plugins `mdnet::SelectiveScan` and `mdnet::SelectiveScanReverse`.

Those of version 2 are in `mdnet_engines.tensorrt.plugin_v2`.

    register_plugins()      # in the process that builds the engine, before it parses the ONNX file

A node that carries `PARSER_ATTRIBUTES` then becomes the plugin. In a process that registered nothing, in TensorRT-RTX
and in every other runtime it stays what its function body says (`mdnet_engines.ops.selective_scan`).

The plugin is built ahead of time, as those attributes ask: the kernel's PTX and its launch, symbolic in the batch, are
written into the engine, and whoever runs the engine needs neither this package nor Python. A node with `aot` 0 calls
back into `launch` instead, and the engine then needs this package, with its native library, wherever it runs.

*Unverified on a GPU.* What is tested, with NVIDIA's own bindings, is that TensorRT gets the types, shapes, grid and
arguments that the kernel was written for, and that its PTX, executed on the CPU with them, gives the right result.

Whoever runs such an engine should keep an execution context to one batch size (pad the last batch, or have a context
for each size): with every change TensorRT 11.2 is reported to leak the plugins' CUDA modules (NVIDIA/TensorRT#4849).

NVIDIA calls `tensorrt.plugin` experimental. What it demands of the functions below was read from its `_validate.py` and
`_plugin_class.py` (11.4): parameters by these names, the register function fully annotated, and the aot_impl function's
return type too.
"""

# No `from __future__ import annotations`: `tensorrt.plugin` compares annotations with its classes, not with strings.

from collections.abc import Sequence
from typing import Any

from mdnet_engines.cuda.kernel import THREADS, Dtype, channels_per_block, has_small, kernel_name
from mdnet_engines.cuda.ptx import ptx_of
from mdnet_engines.errors import MDNetError, first_line
from mdnet_engines.ops import native
from mdnet_engines.ops.scan_shapes import check_shapes
from mdnet_engines.tensorrt import plugin_v2

NAMESPACE = "mdnet"
PLUGINS = {"SelectiveScan": False, "SelectiveScanReverse": True}  # the ONNX operator's name → reverse
# What TensorRT's parser reads on a node. Without the first, a function body takes precedence over the plugin; without
# the second it does not know which of the plugin's two implementations to build.
PARSER_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": NAMESPACE, "aot": 1}

# Where there are two kernels, TensorRT times both at the profile's best batch size and keeps the faster one, which then
# runs at every size. The numbers must be positive; 0 is what it passes if none were offered.
TACTIC_LARGE, TACTIC_SMALL = 1, 2

_MAJOR = 11


def register_plugins() -> None:
    """Make the plugins of both versions known to TensorRT's parser and builder, in this process. Idempotent.

    Raises:
        MDNetError: TensorRT is not installed, can't be loaded, is older than 11, or lacks `tensorrt.plugin`.
    """
    trtp = _import_plugin_api()
    for name, reverse in PLUGINS.items():
        if not hasattr(getattr(trtp.op, NAMESPACE, None), name):
            _register(name, reverse)
    plugin_v2.register(trtp, NAMESPACE)


def _register(name: str, reverse: bool) -> None:
    import tensorrt.plugin as trtp

    plugin_id = f"{NAMESPACE}::{name}"

    @trtp.register(plugin_id)
    def describe(
        u: trtp.TensorDesc,
        delta: trtp.TensorDesc,
        A: trtp.TensorDesc,
        B: trtp.TensorDesc,
        C: trtp.TensorDesc,
        D: trtp.TensorDesc,
        z: trtp.TensorDesc,
        delta_bias: trtp.TensorDesc,
    ) -> trtp.TensorDesc:
        return u.like()

    @trtp.autotune(plugin_id)
    def supported(u, delta, A, B, C, D, z, delta_bias, outputs):  # type: ignore[no-untyped-def]
        combination = trtp.AutoTuneCombination()
        combination.pos([0, 1, 3, 4, 6, 8], "FP32|FP16|BF16", "LINEAR")  # u, delta, B, C, z, y: all of the same type
        combination.pos([2, 5, 7], "FP32", "LINEAR")  # A, D, delta_bias
        if has_small(A.shape[1]):
            combination.tactics([TACTIC_LARGE, TACTIC_SMALL])
        return [combination]

    @trtp.aot_impl(plugin_id)
    def into_engine(  # type: ignore[no-untyped-def]
        u, delta, A, B, C, D, z, delta_bias, outputs, tactic
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        check_shapes(*(tensor.shape for tensor in (u, delta, A, B, C, D, z, delta_bias)))
        batch, channels, length = u.shape_expr
        # The number of states chooses the kernel, so it must be a number here, not a symbol.
        kernel = kernel_name(
            reverse=reverse, dtype=plugin_v2.DTYPES[u.dtype.name], states=A.shape[1], small=tactic == TACTIC_SMALL
        )
        grid = trtp.KernelLaunchParams(
            grid_x=batch, grid_y=trtp.cdiv(channels, channels_per_block(kernel)), block_x=THREADS, shared_mem=0
        )
        scalars = trtp.SymIntExprs.from_tuple((channels, length, A.shape_expr[1]))
        return kernel, ptx_of(kernel), grid, scalars

    @trtp.impl(plugin_id)
    def just_in_time(u, delta, A, B, C, D, z, delta_bias, outputs, stream):  # type: ignore[no-untyped-def]
        inputs = (u, delta, A, B, C, D, z, delta_bias)
        launch(inputs, outputs[0], stream, dtype=plugin_v2.DTYPES[u.dtype.name], reverse=reverse)


def launch(inputs: Sequence[Any], y: Any, stream: int, *, dtype: Dtype, reverse: bool) -> None:
    """Start the scan on `stream`, in the thread's current CUDA context, and return without waiting for it.

    Args:
        inputs: the operator's eight, in its order: each has `shape` and `data_ptr`, as `tensorrt.plugin.Tensor` does.
        y: the output, likewise; [batch, D, L].
        stream: a CUDA stream's handle.
        dtype: the type of u, delta, B, C, z and y.

    Raises:
        MDNetError: there is no kernel for this call, no native library or CUDA driver, or the driver refuses it.
    """
    u, delta, A, B, C, D, z, delta_bias = inputs
    check_shapes(*(tensor.shape for tensor in inputs))
    contiguous = (native.Rows(tensor.data_ptr, 0, 0) for tensor in (u, delta, z, B, C))
    parameters = (tensor.data_ptr for tensor in (A, D, delta_bias))
    sizes = (*u.shape, A.shape[1])
    native.run_cuda(native.Scan(*sizes, native.TYPES[dtype], reverse, 0, *contiguous, *parameters, y.data_ptr), stream)


def _import_plugin_api() -> Any:
    """`tensorrt.plugin` of a TensorRT that is new enough; never `tensorrt_rtx`, which has nothing like it."""
    try:
        import tensorrt as trt
    except Exception as error:  # a missing package, or one of its libraries
        raise MDNetError(
            f"TensorRT can't be imported; it is the extra mdnet[tensorrt] ({first_line(error)})"
        ) from error
    version = str(getattr(trt, "__version__", "of unknown version"))
    major = version.partition(".")[0]
    if not major.isdecimal() or int(major) < _MAJOR:
        raise MDNetError(
            f"the SelectiveScan plugin needs TensorRT {_MAJOR} or newer, this is {version}: "
            "install the extra mdnet[tensorrt]"
        )
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise MDNetError(
            f"this TensorRT {version} lacks tensorrt.plugin, which SelectiveScan is written for: "
            f"install the extra mdnet[tensorrt] ({first_line(error)})"
        ) from error
    return trtp
