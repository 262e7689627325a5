"""Exported files run in ONNX Runtime."""
