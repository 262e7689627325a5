"""The directory that a run writes: writing it, describing it, verifying it, loading it."""
