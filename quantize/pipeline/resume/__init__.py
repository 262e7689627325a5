"""A killed run can go on from what it has written."""
