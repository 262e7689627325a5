"""What happens to one block, one step a file."""
