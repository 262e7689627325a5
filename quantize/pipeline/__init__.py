"""One run: load, calibrate, transform, round, verify, write."""
