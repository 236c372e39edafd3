"""Run the native library's CUDA operators without ONNX Runtime: python -m cuda_stub.ort_probe '[{"name": …}, …]'

ONNX Runtime for CPUs never calls them. Here its table of functions is made in Python, and the CUDA driver is the stub.
Each node has a `name`, the element type `type` of its first input, as ONNX numbers it, and the shapes of its `inputs`.
Input i is at address 4096 · (i + 1), output i at 4096 · (i + 101), the stream is 0x57. Prints the operators that were
registered (`registered`: name, provider, types of inputs and of outputs), the shapes of each node's outputs, what each
node said, and what the driver noted.
"""

from __future__ import annotations

import ctypes
import json
import sys
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any

from cuda_stub import Driver
from mdnet_engines.ops import native

CUDA = "CUDAExecutionProvider"
STREAM = 0x57
_OUT, _SIZES = POINTER(c_void_p), POINTER(c_int64)


class Host:
    """The parts of ONNX Runtime's C interface that operators call; handles are places in `values`, counted from 1."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.values: list[tuple[int, list[int]]] = []  # address and shape
        self.inputs: list[int] = []  # handles
        self.outputs: list[list[int]] = []
        self.said: list[str] = []
        table = {
            0: CFUNCTYPE(c_void_p, c_int, c_char_p)(self._create_status),
            26: CFUNCTYPE(c_void_p, c_char_p, _OUT)(lambda _, out: _put(out, 1)),
            27: CFUNCTYPE(c_void_p, c_void_p, c_void_p)(lambda _, op: self.ops.append(Op(op))),
            28: CFUNCTYPE(c_void_p, c_void_p, c_void_p)(lambda *_: None),
            51: CFUNCTYPE(c_void_p, c_void_p, _OUT)(lambda value, out: _put(out, self.values[value - 1][0])),
            61: CFUNCTYPE(c_void_p, c_void_p, POINTER(c_size_t))(lambda v, out: _put(out, len(self._shape(v)))),
            62: CFUNCTYPE(c_void_p, c_void_p, _SIZES, c_size_t)(self._dimensions),
            65: CFUNCTYPE(c_void_p, c_void_p, _OUT)(lambda value, out: _put(out, value)),
            90: CFUNCTYPE(c_void_p, c_void_p, c_size_t, _OUT)(lambda _, i, out: _put(out, self.inputs[i])),
            91: CFUNCTYPE(c_void_p, c_void_p, c_size_t, _SIZES, c_size_t, _OUT)(self._output),
            99: CFUNCTYPE(None, c_void_p)(lambda _: None),
            193: CFUNCTYPE(c_void_p, c_void_p, _OUT)(lambda _, out: _put(out, STREAM)),
        }
        self._kept = table
        self.api = (c_void_p * 300)(*(ctypes.cast(table[i], c_void_p) if i in table else None for i in range(300)))
        get_api = CFUNCTYPE(c_void_p, c_uint32)(lambda _: ctypes.addressof(self.api))
        self._base = (c_void_p * 2)(ctypes.cast(get_api, c_void_p), None)
        library = ctypes.CDLL(str(native.custom_op_library()))
        library.RegisterCustomOps.restype = c_void_p
        assert not library.RegisterCustomOps(c_void_p(1), self._base)

    def run(self, node: dict[str, Any]) -> tuple[list[list[int]], str]:
        (op,) = (o for o in self.ops if (o.name, o.provider, o.inputs[0]) == (node["name"], CUDA, node["type"]))
        self.values = [(4096 * (i + 1), shape) for i, shape in enumerate(node["inputs"])]
        self.inputs = [i + 1 for i in range(len(self.values))]
        self.outputs, self.said = [], []
        kernel = c_void_p()
        assert not op.call(17, c_void_p, ctypes.addressof(self.api), 0, ctypes.addressof(kernel))
        compute = CFUNCTYPE(c_void_p, c_void_p, c_void_p)(op.entry(18))
        compute(kernel, 1)
        CFUNCTYPE(None, c_void_p)(op.entry(9))(kernel)
        return self.outputs, "".join(self.said)

    def _create_status(self, _: int, message: bytes) -> int:
        self.said.append(message.decode())
        return 1

    def _shape(self, value: int) -> list[int]:
        return self.values[value - 1][1]

    def _dimensions(self, value: int, sizes: Any, count: int) -> None:
        for axis, size in enumerate(self._shape(value)[:count]):
            sizes[axis] = size

    def _output(self, _: int, i: int, sizes: Any, count: int, out: Any) -> None:
        self.outputs.append(sizes[:count])
        self.values.append((4096 * (i + 101), sizes[:count]))
        _put(out, len(self.values))


class Op:
    """An `OrtCustomOp`, by the places of its members."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._members = (c_void_p * 19).from_address(address)
        self.name, self.provider = (self.call(i, c_char_p).decode() for i in (2, 3))
        self.inputs, self.outputs = (
            [self.call(i, c_int, place) for place in range(self.call(i + 1, c_size_t))] for i in (4, 6)
        )

    def entry(self, i: int) -> int:
        return int(self._members[i])

    def call(self, i: int, result: Any, *arguments: int) -> Any:
        return CFUNCTYPE(result, c_void_p, *[c_void_p] * len(arguments))(self.entry(i))(self._address, *arguments)


def _put(out: Any, value: int) -> None:
    out[0] = value


if __name__ == "__main__":
    host = Host()
    ran = [host.run(node) for node in json.loads(sys.argv[1])]
    registered = [(op.name, op.provider, op.inputs, op.outputs) for op in host.ops]
    outputs, said = [each[0] for each in ran], [each[1] for each in ran]
    print(json.dumps({"registered": registered, "outputs": outputs, "said": said, "calls": Driver().calls}))
