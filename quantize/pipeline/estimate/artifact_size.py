"""The artifact that a run will write is made on the meta device: every tensor and every byte, without any weight."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.artifact.quantization_config import linear_settings, quantization_settings
from quantize.artifact.writer import as_json
from quantize.calibration.data import Samples
from quantize.calibration.probes import PROBE_TOKENS
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.opening import side_files
from quantize.graph.linears import Linear
from quantize.graph.program import Program
from quantize.graph.shapes import ShapeInfo
from quantize.nn.quantized_experts import QuantizedExperts, quantized_product
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.passes.base import LinearContext
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.plan import Plan, Step, changed_by
from quantize.pipeline.rng import derived_generator
from quantize.pipeline.tables import module_of
from quantize.quantizers.rtn import quantize_on_meta
from quantize.scheme.scheme import TABLE_SCHEME, Scheme
from quantize.transforms.online import InputTransform


@dataclass(frozen=True)
class ArtifactEstimate:
    """What a run will write, as far as it does not depend on data.

    Attributes:
        checkpoint, program, plan, samples: the parts of the prepared run.
        dtypes: the dtype in which each parameter is stored.
        held_out: the rows that the run judges its result by.
    """

    checkpoint: Checkpoint
    program: Program
    plan: Plan
    samples: Samples
    dtypes: Mapping[str, torch.dtype]
    held_out: HeldOutRows

    @functools.cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Each parameter on the meta device, in the dtype in which it is stored."""
        shapes = {name: node.meta["val"].shape for node, name in self.program.parameters.items()}
        return {name: torch.empty(shape, dtype=self.dtypes[name], device="meta") for name, shape in shapes.items()}

    @functools.cached_property
    def modules(self) -> dict[str, QuantizedLinear | QuantizedExperts]:
        """The quantized linears on the meta device, by path, as far as they do not depend on data."""
        linears = self.program.all_linears
        return {x.path: self._module(x) for x in linears if x.path in self.plan.schemes}

    def _module(self, linear: Linear) -> QuantizedLinear | QuantizedExperts:
        W, planned = linear.as_out_in(self.parameters[linear.weight]), self.plan.schemes[linear.path]
        input_transform = InputTransform(activations=planned.activations)
        for step in self.plan.steps:
            if linear.path in step.online:
                input_transform = step.handler.input_transform(self._linear_context(step, linear, W, input_transform))
        weight = quantize_on_meta(W.shape, W.dtype, planned.weights, linear.experts)
        scheme = Scheme(weights=planned.weights, activations=input_transform.activations)
        bias = self.parameters.get(linear.bias or "")
        return quantized_product(weight, bias, scheme, input_transform.online, linear.experts, linear.transposed)

    def _linear_context(self, step: Step, linear: Linear, W: Tensor, input_transform: InputTransform) -> LinearContext:
        basis = step.bases.reading(linear.weight)
        return LinearContext(
            linear.path, basis, None, W, (W,), input_transform, self.plan.schemes[linear.path], derived_generator(0)
        )

    @functools.cached_property
    def tensors(self) -> list[dict[str, Tensor]]:
        """The tensors that each file of weights will hold."""
        tables = {name: self.parameters[name] for name in self.plan.tables}
        kept = set(self.parameters) - self._replaced - self._left_out - set(tables)
        found = list[dict[str, Tensor]]()
        for segment in self.program.segments:
            new = {name: self.parameters[name] for name in segment.parameters if name in kept}
            for linear in self.program.linears(segment):
                state = self.modules[linear.path].state_dict() if linear.path in self.modules else {}
                new |= {f"{linear.path}.{name}": tensor for name, tensor in state.items()}
            new |= stored_tables(tables, segment.parameters)
            found.append(new)
            kept -= set(new)
        read = {name for segment in self.program.segments for name in segment.parameters}
        unread = stored_tables(tables, tables.keys() - read)
        return [*found, {name: self.parameters[name] for name in kept} | unread | self.checkpoint.buffers()]

    @property
    def _replaced(self) -> set[str]:
        linears = self.program.all_linears
        return {name for x in linears if x.path in self.modules for name in (x.weight, x.bias) if name}

    @property
    def _left_out(self) -> set[str]:
        """The names that will not be stored: all but one of tied parameters that no pass touches and that stay tied."""
        changed = changed_by(self.plan.steps) | self._replaced | set(self.plan.tables)
        groups = {names for names in self.program.ties.values() if not {*names} & changed}
        order = {name: n for n, name in enumerate(n for s in self.program.segments for n in s.parameters)}
        return {name for names in groups for name in sorted(names, key=lambda n: order.get(n, len(order)))[1:]}

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The quantization settings that the artifact will have."""
        recipe = self.plan.recipe
        default = self.plan.default_scheme
        modules = {path: linear_settings(module, default) for path, module in self.modules.items()}
        return quantization_settings(recipe, default, modules)

    @functools.cached_property
    def stored(self) -> list[Tensor]:
        """The parameters on the meta device, of those that are tied one."""
        names = {
            next((n for n in self.program.ties.get(name, ()) if n in self.parameters), name) for name in self.parameters
        }
        return [self.parameters[name] for name in sorted(names)]

    def parameter_count(self) -> int:
        """Return the number of parameters that the pass reads."""
        return sum(x.numel() for x in self.stored)

    def float_bytes(self) -> int:
        """Return the bytes of the float model's parameters."""
        return sum(x.nbytes for x in self.stored)

    def artifact_bytes(self) -> int:
        """Return the size of all files of the artifact, in bytes, without what people look at.

        The page, the model card and the figures in the manifest are some 200,000 bytes, however large the model is.
        """
        weights = sum(file_bytes(tensors) for tensors in self.tensors)
        directory = self.checkpoint.directory
        side = sum((directory / path).stat().st_size for path in side_files(directory)) if directory else 0
        return weights + side + self._text_bytes() + self._probe_bytes()

    def _text_bytes(self) -> int:
        """Return the bytes of config, recipe, index and manifest: their lists, and a constant for the rest."""
        index = {name: f"model-{0:05}-of-{0:05}.safetensors" for tensors in self.tensors for name in tensors}
        listed = len(as_json(self.settings)) * 2 + len(as_json({"weight_map": index}))
        gates = {
            step.handler.name: {s.name: 1.2345678901234567e-07 for s in self.program.segments} for step in self.steps
        }
        online = {step.handler.name: step.online for step in self.plan.steps if step.online}
        coverage = dict.fromkeys(self.parameters, "quantized") | self.plan.skipped
        manifest = {"gate": gates, "online": online, "coverage": coverage, "files": ["0" * 96] * len(self.tensors)}
        config = len(as_json(self.checkpoint.config)) if self.checkpoint.config else 0
        scores = 400 if self.held_out.rows else 0
        return listed + config + len(as_json(manifest)) + len(self.plan.recipe.to_toml()) + scores + 2000

    @property
    def steps(self) -> list[Step]:
        """The passes that the equivalence check will see."""
        return [step for step in self.plan.steps if step.sites or step.online]

    def _probe_bytes(self) -> int:
        """Return the bytes of the probes: two inputs of a few tokens, and the output at the last token."""
        node = self.program.output.all_input_nodes[0]
        row = ShapeInfo(self.program, {name: (1, *x.shape) for name, x in self.samples.rows[0].items()})
        shape = row.shape(node)
        output = math.prod(shape[:1] + shape[2:] if len(shape) == 3 else shape)
        most = math.inf if self.samples.whole else PROBE_TOKENS
        inputs = sum(int(min(x.numel(), most)) for x in self.samples.rows[0].values())
        return 2 * (4 * output + 8 * inputs) + 300


def stored_tables(tables: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors that are stored of some of the tables of words, which are given on the meta device."""
    made = {
        module_of(name): quantize_on_meta(tables[name].shape, tables[name].dtype, TABLE_SCHEME.weights)
        for name in names
        if name in tables
    }
    return {f"{path}.{part}": x for path, table in made.items() for part, x in table.tensors().items()}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of a safetensors file: length, header padded to 8 bytes, and data; 0 without tensors."""
    if not tensors:
        return 0
    data, header = sum(x.nbytes for x in tensors.values()), {"__metadata__": {"format": "pt"}}
    entries = {n: {"dtype": "F32", "shape": list(x.shape), "data_offsets": [data, data]} for n, x in tensors.items()}
    return 8 + -(-len(json.dumps(header | entries, separators=(",", ":"))) // 8) * 8 + data
