"""Both FP4 formats, with their group sizes, are parameters of tests; these are their operands."""

import pytest
import torch

from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs

GROUP = {"mxfp4": 32, "nvfp4": 16}
ARGS = {name: WeightArgs(num_bits=4, format=name, group_size=size) for name, size in GROUP.items()}
SCHEMES = {
    name: Scheme(weights=args, activations=ActivationArgs(num_bits=4, format=name)) for name, args in ARGS.items()
}
FORMATS = pytest.mark.parametrize("name", GROUP)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
