"""Kernels: the reference, the Triton kernels, and `ops`, the only door to them."""
