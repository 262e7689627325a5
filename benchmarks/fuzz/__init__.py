"""Broken files of every kind, read by the commands."""
