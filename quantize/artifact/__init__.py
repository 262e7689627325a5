"""The artifact is the directory that a run writes; it is written, described, verified and loaded here."""
