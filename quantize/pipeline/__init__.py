"""One run loads a model, calibrates, transforms and rounds it, verifies the result, and writes it."""
