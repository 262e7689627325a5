"""Export to a compressed-tensors checkpoint."""
