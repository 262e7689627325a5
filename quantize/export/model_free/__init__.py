"""Checkpoints are rounded file by file without the model's code, so that no architecture need be known."""
