"""Schemes say what is quantized to how many bits; a registry finds passes, quantizers and formats by name."""
