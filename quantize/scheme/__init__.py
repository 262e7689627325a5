"""What is quantized to how many bits, and the registry that finds passes, quantizers and formats by name."""
