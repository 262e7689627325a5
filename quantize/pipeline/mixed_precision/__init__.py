"""Under a budget of bits, linears whose rounding costs most take more bits or smaller groups."""
