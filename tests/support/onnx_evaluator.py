"""onnx's own evaluator, with a `Scan` for more axes and directions than it has: a host that shares nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The model's outputs. Slow: for small cases."""
    inlined = inline_local_functions(model)  # the evaluator gives no new operators to functions
    return ReferenceEvaluator(inlined, new_ops=[Scan]).run(None, dict(feeds))


class Scan(OpRun):
    """The standard's Scan: onnx's own evaluator has it for axis 0 and the forward direction only."""

    op_domain = ""

    def need_context(self) -> bool:
        return True  # the body uses names from around it

    def _run(self, *args: np.ndarray, context: dict, **attributes: object) -> tuple[np.ndarray, ...]:
        count = attributes["num_scan_inputs"]
        states, scanned = list(args[:-count]), args[-count:]
        slices = [
            list(np.moveaxis(values, axis, 0)[:: -1 if backwards else 1])
            for values, axis, backwards in zip(
                scanned, attributes["scan_input_axes"], attributes["scan_input_directions"], strict=True
            )
        ]
        steps = []
        for step in zip(*slices, strict=True):
            outputs = self._run_body({**context, **dict(zip(self.body.input_names, [*states, *step], strict=True))})
            states, results = outputs[: len(states)], outputs[len(states) :]
            steps.append(results)
        stacked = [
            np.stack(values[:: -1 if backwards else 1], axis)
            for values, axis, backwards in zip(
                zip(*steps, strict=True),
                attributes["scan_output_axes"],
                attributes["scan_output_directions"],
                strict=True,
            )
        ]
        return (*states, *stacked)
