"""Products of matrices in bfloat16, and attention, as ONNX operators with a function body of standard operators.

Domain "mdnet", version 1, no attributes. Inputs are rounded to bfloat16, products are added up in float32:

    y = BFloat16MatMul           (a, b)        a [..., M, K]   b [..., K, N]
    y = BFloat16MatMulTransposedA(a, b)        a [..., K, M]   b [..., K, N]
    y = BFloat16MatMulTransposedB(a, b)        a [..., M, K]   b [..., N, K]      → y [..., M, N], all float32

    y = BFloat16Attention(q, k, v)             q [..., L, D]   k [..., D, S]   v [..., S, E]   → y [..., L, E]

The last is softmax(q·k)·v, the softmax in float32 and rounded, as it is an input of a product. The axes in front count
matrices: an input has those of the others, or only the last of them, axes of size 1 in front aside. The operators are
for ONNX Runtime on the CPU. The native kernels exist for processors that multiply bfloat16 (AVX-512 BF16), twice
as fast as float32; elsewhere ONNX Runtime runs the function body.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

from mdnet_engines.ops.function_body import body

PRODUCTS = {
    (False, False): "BFloat16MatMul",
    (True, False): "BFloat16MatMulTransposedA",
    (False, True): "BFloat16MatMulTransposedB",
}
"""By whether a, and b, is transposed."""
ATTENTION = "BFloat16Attention"


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    return _attention() if name == ATTENTION else _product(name)


def _rounded(x: str) -> list[NodeProto]:
    """Nodes that round `x` to bfloat16; the float32 value is called `x`32."""
    return [
        helper.make_node("Cast", [x], [f"{x}16"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [f"{x}16"], [f"{x}32"], to=TensorProto.FLOAT),
    ]


def _product(name: str) -> onnx.FunctionProto:
    turned = next(sides for sides, known in PRODUCTS.items() if known == name)
    nodes, operands = [], []
    for x, transposed in zip(("a", "b"), turned, strict=True):
        nodes += _rounded(x)
        operands.append(f"{x}32")
        if transposed:  # whatever the number of axes, which a Transpose would have to know
            operands[-1] = f"{x}_turned"
            nodes.append(helper.make_node("Einsum", [f"{x}32"], operands[-1:], equation="...ij->...ji"))
    return body(name, ["a", "b"], [*nodes, helper.make_node("MatMul", operands, ["y"])])


def _attention() -> onnx.FunctionProto:
    nodes = [
        *_rounded("q"),
        *_rounded("k"),
        helper.make_node("MatMul", ["q32", "k32"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"], axis=-1),
        *_rounded("p"),
        *_rounded("v"),
        helper.make_node("MatMul", ["p32", "v32"], ["y"]),
    ]
    return body(ATTENTION, ["q", "k", "v"], nodes)
