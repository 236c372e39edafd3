"""`mdnet_export.scan.export`: a model with selective scans as an ONNX file that was compared with the model."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mdnet_engines.errors import MDNetError, first_line, require
from mdnet_engines.ops import native
from mdnet_engines.ops import selective_scan as scan_op
from mdnet_export.scan.translate import function_body, quiet_exporter, translation_table

Axes = Mapping[int, str]
_HALF = 2.0**-6  # what two roundings of a bfloat16 may cost; more than a float16's


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    """Each input's shape in the file; an axis with a name takes any size."""
    scans: dict[str, int]
    """How many nodes each scan operator has."""
    differences: dict[str, float]
    """For each run in ONNX Runtime: the largest difference from the model, relative to the output's largest value."""

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in self.inputs.items())
        nodes = ", ".join(f"{count} {name}" for name, count in self.scans.items())
        worst = max(self.differences.values(), default=None)
        proof = "not compared" if worst is None else f"{len(self.differences)} runs within {worst:.1e} of the model"
        return f"{self.path}: {shapes}; {nodes}; {proof}"


def export(
    model: nn.Module,
    example: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    dynamic: Mapping[str, Axes] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int = 18,
    external_data: bool | None = None,
    check: bool = True,
    check_at: Mapping[str, int] | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write the model to `path`, one node for each scan; then compare the file with the model in ONNX Runtime.

    The file is run as it is and, where there is one, with the native library: at the sizes of `example`, then at
    others, on values drawn from the example's. Nothing is written where a result differs.

    Args:
        model: in float32 or a half type; exported and run in evaluation mode.
        example: the arguments of `model.forward`, by position; tensors may lie in tuples and lists.
        dynamic: for an input's name, which axes take any size, and what each is called; axes of one name have one size.
            By default axis 0 of every tensor is "batch". An axis of size 1 is exported at size 2, as the exporter
            would otherwise take the 1 for a constant.
        input_names: by default the parameters of `model.forward`, numbered where one holds several tensors.
        output_names: as of `torch.onnx.export`.
        opset_version: 18 or more.
        external_data: weights in a file of their own, `path` + ".data"; by default where one file would pass 2 GB.
        check: whether to compare at all; ONNX Runtime must then be installed.
        check_at: the sizes of the second run by their names; by default one to three more than the example's.
        tolerance: how far float32 outputs may be off, relative to the largest value.

    Raises:
        MDNetError: the exporter made a constant of a size in `dynamic`; a result differs; the model has no scan, is in
            float64; ONNX Runtime is missing.
    """
    if opset_version < 18:
        raise MDNetError(f"opset_version is {opset_version}; PyTorch's exporter and the scan's function bodies need 18")
    if check:
        require("onnxruntime", "cpu")
    arguments = inspect.signature(model.forward).bind(*example).arguments
    inputs = _Inputs(arguments, input_names, dynamic)
    path = Path(path)
    with _evaluation(model), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        program = _exported(model, inputs, output_names, opset_version)
        scans = _attach(program.model)
        _refuse_constants(program.model, inputs)
        draft = Path(folder) / path.name
        program.save(draft, external_data=external_data)
        differences = dict(_compare(model, draft, inputs, check_at or {}, tolerance)) if check else {}
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    return Exported(path, inputs.shapes(), scans, differences)


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every part is in the mode that it was in."""
    before = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


class _Inputs:
    """The tensors of an example, in the order of the file's inputs, and their axes with a name."""

    def __init__(self, arguments: dict[str, Any], names: Sequence[str] | None, dynamic: Mapping[str, Axes] | None):
        self._parameters = list(arguments)
        leaves, self._tree = pytree.tree_flatten(tuple(arguments.values()))
        self._leaves = leaves
        self._places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.names = list(names) if names else self._default_names(arguments)
        if len(self.names) != len(self._places):
            raise MDNetError(f"input_names has {len(self.names)} names, the example {len(self._places)} tensors")
        if unknown := sorted(set(dynamic or {}) - set(self.names)):
            raise MDNetError(f"dynamic names {', '.join(unknown)}; the inputs are {', '.join(self.names)}")
        if dynamic is None:
            pairs = zip(self.names, self.tensors, strict=True)
            dynamic = {name: {0: "batch"} for name, tensor in pairs if tensor.ndim}
        self.axes = [dict(dynamic.get(name, {})) for name in self.names]
        self.sizes: dict[str, int] = {}
        for name, tensor, axes in zip(self.names, self.tensors, self.axes, strict=True):
            for axis, size_name in axes.items():
                if axis >= tensor.ndim:
                    raise MDNetError(f"dynamic names axis {axis} of {name}, which is {tuple(tensor.shape)}")
                size = self.sizes.setdefault(size_name, tensor.shape[axis])
                if tensor.shape[axis] != size:
                    raise MDNetError(f"{size_name} is {tensor.shape[axis]} in {name}, and {size} in another axis")

    @property
    def tensors(self) -> list[Tensor]:
        return [self._leaves[place] for place in self._places]

    def _default_names(self, arguments: dict[str, Any]) -> list[str]:
        names = []
        for parameter, value in arguments.items():
            count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
            names += [parameter] if isinstance(value, Tensor) else [f"{parameter}_{k}" for k in range(count)]
        return names

    def arguments(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """What `forward` takes, by parameter, with these in place of the example's tensors."""
        leaves: list[Any] = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        return dict(zip(self._parameters, pytree.tree_unflatten(leaves, self._tree), strict=True))

    def shapes_for_torch(self) -> dict[str, Any]:
        """`dynamic_shapes` of `torch.export`."""
        dims = {name: torch.export.Dim(name, min=1) for name in self.sizes}
        leaves: list[Any] = [None] * len(self._leaves)
        for place, axes in zip(self._places, self.axes, strict=True):
            leaves[place] = {axis: dims[name] for axis, name in axes.items()}
        return dict(zip(self._parameters, pytree.tree_unflatten(leaves, self._tree), strict=True))

    def drawn(self, sizes: Mapping[str, int]) -> list[Tensor]:
        """Tensors of these sizes, of values that the example's have."""
        return [self._drawn(tensor, axes, sizes) for tensor, axes in zip(self.tensors, self.axes, strict=True)]

    @staticmethod
    def _drawn(tensor: Tensor, axes: Mapping[int, str], sizes: Mapping[str, int]) -> Tensor:
        wanted = [sizes[axes[axis]] if axis in axes else size for axis, size in enumerate(tensor.shape)]
        if list(tensor.shape) == wanted or not tensor.numel():
            return tensor.new_zeros(wanted) if not tensor.numel() else tensor.clone()
        chosen = torch.randint(tensor.numel(), wanted, generator=torch.Generator().manual_seed(0))
        return tensor.detach().flatten()[chosen.to(tensor.device)]

    def shapes(self) -> dict[str, tuple[int | str, ...]]:
        """Each input's shape with its names."""
        return {
            name: tuple(axes.get(axis, size) for axis, size in enumerate(tensor.shape))
            for name, tensor, axes in zip(self.names, self.tensors, self.axes, strict=True)
        }


def _exported(
    model: nn.Module, inputs: _Inputs, output_names: Sequence[str] | None, opset: int
) -> torch.onnx.ONNXProgram:
    large_enough = {name: max(size, 2) for name, size in inputs.sizes.items()}
    arguments = inputs.arguments(inputs.drawn(large_enough))
    positional, keyword = _as_call(model, arguments)
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                model,
                positional,
                kwargs=keyword,
                dynamo=True,
                opset_version=opset,
                input_names=inputs.names,
                output_names=output_names,
                dynamic_shapes=inputs.shapes_for_torch(),
                custom_translation_table=translation_table(),
                verbose=False,
            )
    except Exception as error:
        # What our own code raised inside the exporter says more than the exporter's account of it.
        for cause in _causes(error):
            if isinstance(cause, MDNetError):
                raise MDNetError(str(cause)) from error
        raise
    assert program is not None
    return program


def _as_call(model: nn.Module, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    bound = inspect.signature(model.forward).bind_partial()
    bound.arguments.update(arguments)
    return bound.args, bound.kwargs


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _attach(model: ir.Model) -> dict[str, int]:
    """Add the function bodies; how many nodes of each scan operator the model has."""
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    scans = Counter(node.op_type for part in parts for node in part.all_nodes() if node.domain == scan_op.DOMAIN)
    if not scans:
        raise MDNetError(
            "the model called no scan of mdnet.scan while it was exported; call selective_scan in it, or put "
            "selective_scan_fn in the place of the scan that it calls"
        )
    for name in scans:
        function = ir.serde.deserialize_function(function_body(name))
        model.functions[function.identifier()] = function
    return dict(sorted(scans.items()))


def _refuse_constants(model: ir.Model, inputs: _Inputs) -> None:
    for name, axes, value in zip(inputs.names, inputs.axes, model.graph.inputs, strict=True):
        for axis, size_name in axes.items():
            assert value.shape is not None
            if isinstance(value.shape[axis], int):
                raise MDNetError(
                    f"the exporter fixed {size_name}, axis {axis} of {name}, at {value.shape[axis]}: the model makes a "
                    "Python number of it, as int(), len() and comparisons do. Take it from tensor.shape and leave it "
                    "as it is, or leave the axis out of `dynamic`"
                )


def _compare(
    model: nn.Module, file: Path, inputs: _Inputs, check_at: Mapping[str, int], tolerance: float
) -> Iterator[tuple[str, float]]:
    """The name of each run and how far it is from the model; raises where that is more than the tolerance."""
    if unknown := sorted(set(check_at) - set(inputs.sizes)):
        raise MDNetError(f"check_at names {', '.join(unknown)}; `dynamic` names {', '.join(inputs.sizes)}")
    more = {name: size + 1 + count % 3 for count, (name, size) in enumerate(inputs.sizes.items())}
    hosts = _sessions(file)
    for sizes, cause in ((inputs.sizes, _NOT_THE_SAME), ({**more, **check_at}, _CONSTANT)):
        where = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the example"
        tensors = inputs.drawn(sizes)
        expected = _run_model(model, inputs, tensors, where)
        if any(tensor.dtype == torch.bfloat16 for tensor in (*tensors, *expected)):
            raise MDNetError(
                "an input or output is bfloat16, which NumPy lacks: cast it in the model, or pass check=False"
            )
        feeds = {name: tensor.cpu().numpy() for name, tensor in zip(inputs.names, tensors, strict=True)}
        for host, session in hosts.items():
            run = f"{where}, {host}"
            try:
                got = session.run(None, feeds)
            except Exception as error:
                raise MDNetError(f"the file does not run at {run}: {first_line(error)}. {_CONSTANT}") from error
            if len(got) != len(expected):
                raise MDNetError(f"the file has {len(got)} outputs, the model {len(expected)} tensors")
            yield (
                run,
                max(
                    _difference(f"{run}, {output.name}", found, wanted, tolerance, cause)
                    for output, found, wanted in zip(session.get_outputs(), got, expected, strict=True)
                ),
            )
        if not inputs.sizes:
            return


_NOT_THE_SAME = "Raise it if float32 explains that in so deep a model; else the model is not the same in every run"
_CONSTANT = "Something in the model makes a constant of a size: int(), len(), a loop over the steps, a buffer"


def _run_model(model: nn.Module, inputs: _Inputs, tensors: Sequence[Tensor], where: str) -> list[Tensor]:
    positional, keyword = _as_call(model, inputs.arguments([tensor.clone() for tensor in tensors]))
    try:
        with torch.no_grad():
            result = model(*positional, **keyword)
    except Exception as error:
        raise MDNetError(
            f"the model itself does not run at {where}: {first_line(error)}. Give sizes that it takes with check_at"
        ) from error
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _sessions(file: Path) -> dict[str, Any]:
    import onnxruntime

    found = {}
    for host, library in (("function bodies", None), ("native library", native.custom_op_library())):
        if host == "native library" and library is None:
            continue
        options = onnxruntime.SessionOptions()
        if library:
            options.register_custom_ops_library(str(library))
        found[host] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return found


def _difference(output: str, got: np.ndarray, expected: Tensor, tolerance: float, cause: str) -> float:
    wanted = expected.detach().cpu()
    shape = tuple(got.shape), tuple(wanted.shape)
    if shape[0] != shape[1]:
        raise MDNetError(f"at {output} is {shape[0]}, from the model {shape[1]}. {_CONSTANT}")
    if not wanted.is_floating_point():
        tolerance = 0
    elif wanted.dtype in (torch.float16, torch.bfloat16):
        tolerance = max(tolerance, _HALF)
    reference = wanted.double().numpy()
    largest = float(np.abs(reference).max(initial=0)) or 1.0
    found = float(np.abs(got.astype(np.float64) - reference).max(initial=0)) / largest
    if not found <= tolerance:
        raise MDNetError(
            f"at {output} is off by {found:.1e} of its largest value; `tolerance` allows {tolerance:.1e}. {cause}"
        )
    return found
