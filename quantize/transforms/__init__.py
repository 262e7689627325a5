"""Invertible transforms of channels, how they are folded into weights, and the proof that the function is unchanged."""
