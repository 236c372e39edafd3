"""The custom operators: ONNX schemas, function bodies, and the native library."""
