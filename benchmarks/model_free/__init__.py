"""Rounding without the model's code beside llm-compressor's `model_free_ptq`."""
