"""`python -m quantize`, as `torchrun -m quantize` needs it."""

from quantize.cli import main

main()
