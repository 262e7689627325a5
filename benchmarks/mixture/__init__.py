"""A small trained mixture of experts, and what quantizing and pruning its experts costs."""
