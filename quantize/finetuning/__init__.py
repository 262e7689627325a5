"""After a short fine-tune a model loses less when it is quantized."""
