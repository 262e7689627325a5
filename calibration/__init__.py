"""Calibration data, statistics of activations, and the runner that drives batches through a model block by block."""
