"""What an artifact can be turned into for other runtimes."""
