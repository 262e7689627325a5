"""The measurements of `quantize-model eval` and `inspect`, and the demo."""
