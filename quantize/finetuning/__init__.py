"""A short fine-tune after which a model loses less when it is quantized."""
