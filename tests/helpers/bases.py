"""These bases have a few channels; a pass is told of them what it needs."""

import torch

from quantize.calibration.statistics import Absmax, Rows
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.basis import Basis, Edge
from quantize.passes.base import BasisContext, LinearContext
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online import InputTransform

W4A4 = Scheme(weights=WeightArgs(num_bits=4), activations=ActivationArgs(num_bits=4))


def edge(name, axis, dim, vector=False):
    return Edge(name, axis, torch.arange(dim)[None], vector)


def basis(dim, writers, readers, group=AllowedTransforms.LINEAR, heads=1):
    return Basis(0, dim, heads, group, tuple(writers), tuple(readers), ())


def site(basis, weights, **statistics):
    """Return a basis with what a pass is told of it; statistics are given by the letter of the weight."""
    seen = {f"{letter}.weight": value for letter, value in statistics.items()}
    schemes = {edge.parameter: W4A4 for edge in basis.readers}
    return BasisContext(basis, seen, weights, schemes, torch.Generator().manual_seed(0))


def place(basis, columns, statistic=None, rows=6):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    input_transform = InputTransform(activations=W4A4.activations)
    return LinearContext("a", basis, statistic, W, (W,), input_transform, W4A4, torch.Generator().manual_seed(0))


def maxima(*values):
    return Rows(absmax=Absmax(torch.tensor(values)))
