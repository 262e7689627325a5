"""What outlives a killed run, so that it can go on."""
