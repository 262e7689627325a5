"""Export to ONNX Runtime."""
