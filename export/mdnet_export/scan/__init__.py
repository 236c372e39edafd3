"""The selective scan on its way into an ONNX file, for any model that uses `mdnet.scan`.

    export(model, example, "model.onnx")            # everything in one call, checked in ONNX Runtime

    program = torch.onnx.export(model, example, dynamo=True, custom_translation_table=translation_table())
    proto = attach_functions(program.model_proto)   # the same in parts

docs/selective-scan.md walks through both.
"""

from mdnet_export.scan.to_file import Exported, export
from mdnet_export.scan.translate import attach_functions, translation_table

__all__ = ["Exported", "attach_functions", "export", "translation_table"]
