"""Products of matrices in bfloat16, as ONNX operators with a function body of standard operators.

Domain "mdnet", version 1, no attributes. Inputs are rounded to bfloat16, products are added up in float32:

    y = BFloat16MatMul           (a, b)        a [..., M, K]   b [..., K, N]
    y = BFloat16MatMulTransposedA(a, b)        a [..., K, M]   b [..., K, N]
    y = BFloat16MatMulTransposedB(a, b)        a [..., M, K]   b [..., N, K]      → y [..., M, N], all float32

The axes in front count matrices: one input has those of the other, or only the last of them, axes of size 1 in front
aside. The operators are for ONNX Runtime on the CPU. The native kernel is there where the processor multiplies bfloat16
(AVX-512 BF16), twice as fast as float32; elsewhere ONNX Runtime runs the function body.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from mdnet_engines.function_body import body

PRODUCTS = {
    (False, False): "BFloat16MatMul",
    (True, False): "BFloat16MatMulTransposedA",
    (False, True): "BFloat16MatMulTransposedB",
}
"""By whether a, and b, is transposed."""


def function(name: str) -> onnx.FunctionProto:
    """The function body of the operator `name`."""
    node = helper.make_node
    transposed = dict(zip(("a", "b"), next(sides for sides, known in PRODUCTS.items() if known == name), strict=True))
    nodes = []
    for x, turned in transposed.items():
        nodes += [
            node("Cast", [x], [f"{x}16"], to=TensorProto.BFLOAT16),
            node("Cast", [f"{x}16"], [f"{x}32"], to=TensorProto.FLOAT),
        ]
        if turned:  # whatever the number of axes, which a Transpose would have to know
            nodes.append(node("Einsum", [f"{x}32"], [f"{x}_turned"], equation="...ij->...ji"))
    operands = [f"{x}_turned" if turned else f"{x}32" for x, turned in transposed.items()]
    nodes.append(node("MatMul", operands, ["y"]))
    return body(name, ["a", "b"], nodes)
