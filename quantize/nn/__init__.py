"""The modules of a loaded quantized model."""
