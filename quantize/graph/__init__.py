"""The exported graph of a model tells where a transform is legal."""
