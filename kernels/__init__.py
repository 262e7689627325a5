"""The reference and the Triton kernels; `ops` is the only door to them."""
