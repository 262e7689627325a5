"""The recipe: everything that determines an artifact, beside model and data."""
