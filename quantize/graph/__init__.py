"""Where a transform is legal, read from the exported graph."""
