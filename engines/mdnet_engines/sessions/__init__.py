"""Sessions: one graph on ONNX Runtime or OpenVINO. Those of TensorRT are in `mdnet_engines.tensorrt`."""
