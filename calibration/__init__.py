"""Calibration: data, statistics of activations, and the runner that drives batches block by block."""
