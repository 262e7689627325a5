"""Modules of a loaded quantized model."""
