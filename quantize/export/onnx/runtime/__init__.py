"""Running exported files with ONNX Runtime."""
