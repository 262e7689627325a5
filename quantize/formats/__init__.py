"""Number formats and the packed tensors that hold them."""
