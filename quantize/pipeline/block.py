"""A block goes through the steps of a run: each step takes a block and returns the block that it made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from quantize.calibration.precision import calibration_dtype
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.formats.qtensor import QTensor
from quantize.graph.interpreter import Overrides
from quantize.graph.linears import Linear
from quantize.graph.program import Program, Segment
from quantize.nn.filed_experts import FiledExperts
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_embedding import Lookup
from quantize.nn.quantized_experts import QuantizedExperts, by_expert, quantized_product
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.expert_weights import AllWeights, ExpertWeights, FloatExperts
from quantize.pipeline.streams import Arriving
from quantize.quantizers.rtn import RoundToNearest
from quantize.scheme.scheme import TABLE_SCHEME, Scheme
from quantize.transforms.online import InputTransform

Product = QuantizedLinear | QuantizedExperts


@dataclass(frozen=True)
class Block:
    """What the steps know of a block. A linear is looked up by itself, never by its path, weight or node.

    Attributes:
        segment: the nodes of the block and the names of its parameters.
        linears: the linears that a quantized linear can replace, in order.
        weights: the parameters in float32, by name, as the steps so far have made them. A step that returns a new
            block may drop weights of the old one that nothing reads any more, so that memory is freed early.
        dtypes: the dtype in which each parameter is stored.
        schemes: the schemes of the linears to quantize; a linear that stays in floating point has none.
        input_transforms: the input transform in front of each linear.
        quantized: the quantized linear, or experts, that run in place of a linear, once it is rounded.
        operators: functions that run in place of other nodes.
        tables: the integers and scales of tables of words, by the name of the parameter, once they are rounded.
        kept: the linears whose weights lay on a grid and were kept, once they are rounded.
        apart: the weights of experts that are not held, and so not among `weights`.
        device: where the weights are.
    """

    segment: Segment
    linears: tuple[Linear, ...]
    weights: dict[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    schemes: Mapping[Linear, Scheme]
    input_transforms: Mapping[Linear, InputTransform]
    quantized: Mapping[Linear, Product] = field(default_factory=dict)
    operators: Mapping[fx.Node, Callable[..., Any]] = field(default_factory=dict)
    tables: Mapping[str, QTensor] = field(default_factory=dict)
    kept: frozenset[Linear] = frozenset()
    apart: Mapping[Linear, ExpertWeights] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  immutable

    @classmethod
    def read(
        cls,
        checkpoint: Checkpoint,
        program: Program,
        segment: Segment,
        schemes: Mapping[str, Scheme],
        device: torch.device,
        large: Iterable[Linear] = (),
        given: dict[str, Arriving] | None = None,
    ) -> Block:
        """Read a block as the float model has it, but experts that are too `large` to be held.

        Args:
            checkpoint, program, segment, device: the model, the block, and where its weights will be.
            schemes: those of the plan, by path.
            large: the experts that are not held.
            given: the weights on their way to the device, as they are stored, which are taken out of it; None reads
                them.

        Raises:
            QuantizeError: a parameter is missing or unreadable.
        """
        linears = tuple(program.linears(segment))
        chosen = {linear: schemes[linear.path] for linear in linears if linear.path in schemes}
        apart = {linear: ExpertWeights(checkpoint, linear, device) for linear in large}
        weights, elsewhere = dict[str, Tensor](), {linear.weight for linear in apart}
        dtypes = {name: checkpoint.dtype_of(name) for name in segment.parameters}
        for name in (name for name in segment.parameters if name not in elsewhere):
            found = checkpoint.float_tensor(name).to(device) if given is None else given.pop(name)()
            weights[name] = found.float()
        plain = {
            linear: InputTransform(activations=chosen[linear].activations if linear in chosen else None)
            for linear in linears
        }
        return cls(segment, linears, weights, dtypes, chosen, plain, apart=apart, device=device)

    @property
    def replaced(self) -> set[str]:
        """Names of the parameters that the tensors of quantized linears replace."""
        return {name for linear in self.schemes for name in (linear.weight, linear.bias) if name}

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype to which the operands of large products are rounded while the block is calibrated and rounded."""
        return calibration_dtype(self.dtypes.values(), self.device)

    def weight(self, linear: Linear) -> Tensor:
        """Return the weight of a linear, float32 [N, K], or of all experts, [experts · N, K]."""
        return self.apart[linear].whole() if linear in self.apart else linear.as_out_in(self.weights[linear.weight])

    def expert(self, linear: Linear, number: int) -> Tensor:
        """Return the weight of one expert, float32 [N, K]."""
        if linear in self.apart:
            return self.apart[linear].expert(number)
        W = self.weights[linear.weight][number]
        return (W.T if linear.transposed else W).contiguous()

    @property
    def all_weights(self) -> AllWeights:
        """The weights by name, with those of experts that are not held."""
        return AllWeights(self.weights, {linear.weight: found for linear, found in self.apart.items()})

    def with_stored(self, names: Iterable[str]) -> Block:
        """Return the block with some parameters rounded to the dtypes in which they are stored."""
        rounded = {name: self.weights[name].to(self.dtypes[name]).float() for name in names}
        return replace(self, weights=self.weights | rounded)

    def with_tables(self, lookups: Mapping[str, Iterable[fx.Node]]) -> Block:
        """Return the block with tables rounded to nearest, each given by its name with the nodes that look up in it.

        From then on `weights` holds the integers of these tables.
        """
        tables, operators = dict[str, QTensor](), dict(self.operators)
        for name in (name for name in lookups if name in self.weights):
            tables[name] = round_table(self.weights[name], self.dtypes[name])
            operators |= dict.fromkeys(lookups[name], Lookup(tables[name].scale))
        weights = self.weights | {name: table.data for name, table in tables.items()}
        return replace(self, weights=weights, operators=operators, tables=tables)

    def with_input_transforms(self, changed: Mapping[Linear, InputTransform]) -> Block:
        """Return the block with new input transforms for some linears; the weights absorb new online transforms."""
        folded, apart = {}, dict(self.apart)
        for linear, found in changed.items():
            done = len(self.input_transforms[linear].online)
            if linear in apart:
                apart[linear] = apart[linear].changed(functools.partial(found.fold_into_weight, done=done))
                continue
            folded[linear.weight] = linear.as_out_in(found.fold_into_weight(self.weight(linear), done))
        transforms = {**self.input_transforms, **changed}
        return replace(self, weights=self.weights | folded, input_transforms=transforms, apart=apart)

    def quantize(self, linear: Linear, weight: QTensor, prefix: PrefixTokens) -> Product:
        """Make a quantized linear of a rounded weight and the input transform; the bias undoes a shift of the input.

        Experts round the prefix's rows like all others, since their rows are in the order of the experts.
        """
        found = self.input_transforms[linear]
        bias = self.weights[linear.bias].to(self.dtypes[linear.bias]) if linear.bias else None
        bias = found.bias(weight.dequantize(), bias) if found.has_shift else bias
        scheme = Scheme(weights=weight.args, activations=found.activations)
        module = quantized_product(weight, bias, scheme, found.online, linear.experts, linear.transposed)
        if isinstance(module, QuantizedLinear):
            module.leading = prefix
        return module

    def overrides(self) -> Overrides:
        """Return what the block runs with: its quantized linears, and online transforms before its other linears."""
        runs: dict[fx.Node, Callable[..., Tensor]] = {}
        for linear in self.linears:
            found = self.input_transforms[linear]
            if linear in self.quantized:
                runs |= dict.fromkeys(linear.calls, self.quantized[linear])
            elif linear in self.apart:
                runs |= dict.fromkeys(linear.calls, FloatExperts(self.apart[linear], found, self._rows(linear)))
            elif found.online:
                W, bias = self.weight(linear), self.weights.get(linear.bias or "")
                runs |= dict.fromkeys(linear.calls, FloatLinear(found, W, found.bias(W, bias), linear.experts))
        return Overrides(self.weights, runs, self.operators)

    def _rows(self, linear: Linear) -> int:
        """Return N, the outputs of experts that are not held."""
        shape = linear.node.meta["val"].shape
        return int(shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the quantized linears and tables, as they are stored, but for what is in a file."""
        stored = {
            linear.path: module.state_dict()
            for linear, module in self.quantized.items()
            if not isinstance(module, FiledExperts)
        }
        stored |= {name.rpartition(".")[0]: table.tensors() for name, table in self.tables.items()}
        return {f"{path}.{name}": tensor for path, held in stored.items() for name, tensor in held.items()}


def round_table(W: Tensor, dtype: torch.dtype | None = None) -> QTensor:
    """Round a table of words [V, K] to nearest, with scales in `dtype`, or else in that of the table."""
    return RoundToNearest().quantize(W.float(), TABLE_SCHEME.weights, None, dtype or W.dtype)


@dataclass(frozen=True)
class FloatLinear:
    """A linear, or all experts, in floating point with online transforms in front."""

    input_transform: InputTransform
    weight: Tensor
    bias: Tensor | None
    experts: int | None = None

    def __call__(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Map [..., K] to [..., N]; the rows of experts as `QuantizedExperts` does."""
        x = self.input_transform.transform(x)
        if self.experts is None:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        weights = self.weight.unflatten(0, (self.experts, -1))
        biases = [None] * self.experts if self.bias is None else self.bias.unflatten(0, (self.experts, -1))

        def product(expert: int, rows: Tensor) -> Tensor:
            return torch.nn.functional.linear(rows, weights[expert], biases[expert])

        return by_expert(x, offs, product, weights.shape[1])
