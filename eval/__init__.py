"""What `quantize-model eval` and `inspect` measure, and the demo."""
