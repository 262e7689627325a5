"""The analysis is checked by random transforms, folded into random weights of real architectures, in float64."""

from __future__ import annotations

import functools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from quantize.checkpoint.meta_model import build_skeleton
from quantize.graph.allowed_transforms import AllowedTransforms
from quantize.graph.analysis import find_bases
from quantize.graph.basis import Bases, Basis
from quantize.graph.export import export_program
from quantize.graph.interpreter import Overrides, run_nodes, start
from quantize.graph.labels import shape_of
from quantize.graph.program import Program
from quantize.transforms.fold import Diagonal, fold

CONFIGS = {path.stem: path for path in sorted((Path(__file__).parents[1] / "models" / "families").glob("*.json"))}
KEPT, MOVED = 1e-10, 1e-7  # relative; what is kept is kept to about 1e-15
KINDS = {
    "positive": AllowedTransforms.POSITIVE_DIAGONAL,
    "diagonal": AllowedTransforms.DIAGONAL,
    "centred": AllowedTransforms.CENTRED_ORTHOGONAL,
    "orthogonal": AllowedTransforms.ORTHOGONAL,
    "linear": AllowedTransforms.LINEAR,
}


@dataclass(frozen=True)
class Case:
    """A program with random weights and an input, all in float64."""

    program: Program
    weights: dict[str, Tensor]
    given: dict[str, Tensor]

    def outputs(self, changed: dict[str, Tensor]) -> Tensor:
        values, state = start(self.program, self.given), Overrides(self.weights | changed)
        for segment in self.program.segments:
            run_nodes(self.program, segment.nodes, values, state)
        results = [n for n in self.program.output.all_input_nodes if n not in self.program.intermediate_outputs]
        return torch.cat([values[node].flatten().double() for node in results])

    @functools.cached_property
    def expected(self) -> Tensor:
        return self.outputs({})

    def moved_by(self, basis: Basis, transform: Blocks) -> float:
        """Return how far the output moves when a transform is folded in, relative to the largest output."""
        found = self.outputs(fold(basis, transform, self.weights))
        return float((found - self.expected).abs().max() / self.expected.abs().max())

    def with_unit_gains(self) -> tuple[Case, frozenset[str]]:
        """Return the same function with every foldable gain folded into its readers, and the names of the gains."""
        weights, gains = self.weights, [b for b in find_bases(self.program).all if b.gain]
        for basis in gains:
            edge = basis.gain
            d = 1 / (weights[edge.parameter][edge.index[0]] + edge.offset)
            weights = weights | fold(basis, Diagonal(d), weights)
        return Case(self.program, weights, self.given), frozenset(b.gain.parameter for b in gains)


@functools.cache
def family(name: str) -> Case:
    """Return one of the configs in `models/families`."""
    return make_case(build_skeleton(json.loads(CONFIGS[name].read_text())))


def make_case(model: torch.nn.Module) -> Case:
    program = in_double(export_program(model))
    weights = {name: random_weight(name, node) for node, name in program.parameters.items()}
    given = {name: random_input(name, node, program) for name, node in program.inputs.items()}
    return Case(program, weights, given)


def in_double(program: Program) -> Program:
    """Compute in float64, because casts to float32, which norms contain, would hide everything below 1e-7."""
    for graph in (m.graph for m in program.module.modules() if isinstance(m, fx.GraphModule)):
        for node in graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, as_double), map_aggregate(node.kwargs, as_double)
    program.buffers.update({n: t.double() for n, t in program.buffers.items() if t.is_floating_point()})
    return program


def as_double(argument):
    return torch.float64 if argument is torch.float32 else argument


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def random_weight(name: str, node: fx.Node) -> Tensor:
    """Draw gains away from one and from zero, and other weights so that activations stay of order one."""
    shape = tuple(node.meta["val"].shape)
    drawn = torch.randn(shape, generator=generator(name), dtype=torch.float64)
    is_gain = len(shape) == 1 and name.endswith("weight")
    return drawn * 0.3 + 1 if is_gain else drawn * (shape or (1,))[-1] ** -0.5


def random_input(name: str, node: fx.Node, program: Program) -> Tensor:
    shape, rng = shape_of(node), generator(name)
    if node.meta["val"].is_floating_point():
        return torch.randn(shape, generator=rng, dtype=torch.float64)
    return torch.randint(0, program.vocabulary, shape, generator=rng)


@dataclass(frozen=True)
class Blocks:
    """The transform T = diag(T_1, …, T_heads), [heads, d, d]."""

    T: Tensor

    def apply(self, rows: Tensor) -> Tensor:
        return torch.einsum("...hd,hde->...he", rows.unflatten(-1, self.T.shape[:2]), self.T.to(rows)).flatten(-2)

    def apply_inverse_transpose(self, columns: Tensor) -> Tensor:
        return Blocks(torch.linalg.inv(self.T).transpose(-1, -2)).apply(columns)


def random_transform(kind: str, dim: int, heads: int, rng: torch.Generator) -> Blocks:
    """Draw a random transform of a kind, with a matrix for each head."""
    d = dim // heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    scales = 0.5 + torch.rand(heads, d, generator=rng, dtype=torch.float64)
    signs = torch.where(normal(heads, d) > 0, 1.0, -1.0).double()
    Q = torch.linalg.qr(normal(heads, d, d))[0]
    if kind == "centred" and d == 1:
        return Blocks(torch.ones(heads, 1, 1, dtype=torch.float64))
    if kind == "centred":  # orthogonal on what is orthogonal to the ones
        ones = torch.linalg.qr(torch.cat([torch.ones(d, 1), torch.eye(d)[:, 1:]], dim=1).double())[0]
        rest = torch.linalg.qr(normal(heads, d - 1, d - 1))[0]
        return Blocks(ones @ torch.stack([torch.block_diag(torch.ones(1, 1), block) for block in rest]) @ ones.T)
    made = {"positive": torch.diag_embed(scales), "diagonal": torch.diag_embed(scales * signs), "orthogonal": Q}
    return Blocks(made.get(kind, Q * scales[:, None]))


def violations(case: Case, bases: Bases | tuple[Basis, ...]) -> list[str]:
    """Return the admissible transforms that change the function."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for basis in getattr(bases, "all", bases):
        for kind in (kind for kind, group in KINDS.items() if group in basis.allowed):
            moved = case.moved_by(basis, random_transform(kind, basis.dim, basis.heads, rng))
            found += [f"{kind} moves {describe(basis)} by {moved:.1e}"] if not moved <= KEPT else []
    return found


def lazy_pins(case: Case, bases: Bases) -> list[str]:
    """Return the transforms that are ruled out although they do not change the function."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for basis in (b for b in bases.all if b.dim > 2):
        heads = 1 if basis.heads == basis.dim else basis.heads
        kinds = [kind for kind, group in KINDS.items() if group not in basis.allowed]
        tried = [(kind, heads) for kind in kinds] + ([("orthogonal", 1)] if basis.heads > 1 else [])
        for kind, blocks in tried:
            moved = case.moved_by(basis, random_transform(kind, basis.dim, blocks, rng))
            found += [f"{kind} keeps {describe(basis)}: {moved:.1e}"] if moved < MOVED else []
    return found


def describe(basis: Basis) -> str:
    ends = [[e.parameter for e in edges] for edges in (basis.writers, basis.readers)]
    return f"basis {basis.index} {basis.allowed} {basis.heads}×{basis.dim // basis.heads} {ends} {basis.pins}"
