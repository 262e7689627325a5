"""A model is traced to an ONNX graph, which is then rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir
import onnxscript.optimizer
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from quantize.errors import QuantizeError
from quantize.export.onnx.complex_pairs import MADE
from quantize.export.onnx.interface import Axes, Interface
from quantize.graph.export import quiet
from quantize.graph.refusal import refusal

OPSET = 23  # the first opset with Attention; from 25 on ONNX Runtime has no kernel for it and runs dozens of nodes


class AsOnnxTakesIt(TorchFunctionMode):
    """Writes out what torch does by itself and the exporter does not.

    One head of keys and values is repeated for all heads of queries (Falcon), integers that are subtracted from a
    float are floats first (XLNet's mask), and complex numbers are pairs of real ones, as positions rotate.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch; attention, queries [..., H, T, D] and keys [..., 1, S, D], with H heads in all."""
        if func in MADE:
            return MADE[func](*args, **kwargs or {})
        if func is torch.Tensor.__rsub__ and isinstance(args[1], float) and not args[0].is_floating_point():
            args = (args[0].to(torch.get_default_dtype()), args[1])
        if func is functional.scaled_dot_product_attention and len(args) > 2:
            query, key, value, *more = args
            heads = query.shape[-3]
            if key.shape[-3] == value.shape[-3] == 1 < heads:
                key, value = (x.expand(*x.shape[:-3], heads, *x.shape[-2:]) for x in (key, value))
            args = (query, key, value, *more)
        return func(*args, **kwargs or {})


def traced(interface: Interface) -> onnx_ir.Model:
    """Return the optimized graph of a model, with names for its inputs, outputs and free axes.

    Raises:
        QuantizeError: the model cannot be traced.
    """
    feed = list(interface.feeds(0).values())[-1]  # the largest batch, as a size of 1 would be a broadcast
    dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in interface.inputs.items()}
    with quiet(), torch.no_grad(), AsOnnxTakesIt():
        try:
            program = torch.onnx.export(
                interface.eval(),
                kwargs={"feed": feed},
                input_names=list(feed),
                output_names=list(interface.outputs),
                opset_version=OPSET,
                # Otherwise it fuses RotaryEmbedding with tables of batch 1, which fails at larger batches.
                optimize="position_ids" in feed,
                verbose=False,
                dynamic_shapes={"feed": dynamic},
            )
        except torch.onnx.OnnxExporterError as error:
            why = refusal(error.__cause__ or error)
            raise QuantizeError(
                f"the model cannot be traced for ONNX, as {why}; run the artifact with quantize.load"
            ) from error
    assert program is not None
    onnxscript.optimizer.optimize(program.model)
    name_axes(program.model, interface.inputs | interface.outputs)
    return program.model


def name_axes(model: onnx_ir.Model, named: dict[str, Axes]) -> None:
    """Give the free axes of inputs and outputs their names in place of the exporter's symbols."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        axes = named[value.name]
        value.shape = onnx_ir.Shape([axes.get(axis, size) for axis, size in enumerate(value.shape)])
