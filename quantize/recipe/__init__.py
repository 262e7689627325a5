"""What is asked for: the recipe, the schemes, and the registry that finds passes, quantizers and formats by name."""
