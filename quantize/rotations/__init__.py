"""Rotations that are found from activations: pure functions of matrices, which know no model, no basis and no pass."""
