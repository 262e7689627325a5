"""Each file here is one step of what happens to a block."""
