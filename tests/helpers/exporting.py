"""Tests of exports share models that are rounded to nearest, and functions that look into ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantize.export.onnx.parity import SESSION_CONFIG, open_session
from quantize.formats.qtensor import QTensor
from quantize.kernels.reference import round_to_grid, scale_and_zero_point
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs
from quantize.transforms.online import Hadamard, InputTransform

FAMILIES = Path(__file__).parents[1] / "models" / "families"
ASYMMETRIC_4 = ActivationArgs(num_bits=4, symmetric=False, clip_ratio=0.9)
ASYMMETRIC_8 = ActivationArgs(num_bits=8, symmetric=False)
SYMMETRIC_8 = ActivationArgs(num_bits=8)


def scheme(bits, activations=None, group_size=0, symmetric=True):
    return Scheme(
        weights=WeightArgs(num_bits=bits, group_size=group_size, symmetric=symmetric), activations=activations
    )


def round_to_nearest(weight, bias, scheme, online=()):
    args = scheme.weights
    weight = InputTransform(tuple(online)).fold_into_weight(weight)
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero_point = scale_and_zero_point(*groups.aminmax(dim=-1, keepdim=True), args.num_bits, args.symmetric)
    q = round_to_grid(groups, scale, zero_point, args.num_bits).flatten(1)
    packed = QTensor.pack(q, scale[..., 0], None if args.symmetric else zero_point[..., 0], args)
    return QuantizedLinear(packed, bias, scheme, online)


def quantized(model, scheme, hadamard=False):
    """Quantize all linears of a model, in place, except for the one that scores the vocabulary."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear | Conv1D) and model.get_submodule(name) is not output:
            weight = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
            online = [Hadamard(weight.shape[1] // 2, stride=2)] if hadamard else []
            bias = None if layer.bias is None else layer.bias.detach()
            model.set_submodule(name, round_to_nearest(weight.contiguous(), bias, scheme, online))
    return model


def nodes(path, op_type):
    return [node for node in onnx.load(path).graph.node if node.op_type == op_type]


def shapes(values):
    """Return name → sizes of axes, by name if they are free."""
    axes = {value.name: value.type.tensor_type.shape.dim for value in values}
    return {name: [axis.dim_param or axis.dim_value for axis in found] for name, found in axes.items()}


def attributes(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def tiny(family, layers=1):
    """Return a random model of a family, of the sizes in tests/models/families."""
    config = json.loads((FAMILIES / f"{family}.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    config |= {"num_hidden_layers": layers, "n_layer": layers, "encoder_layers": layers, "decoder_layers": layers}
    torch.manual_seed(0)
    return cls(cls.config_class.from_dict(config)).eval()


def run_onnx(path, feeds, session_config=SESSION_CONFIG):
    """Return all outputs of a file for each feed."""
    session = open_session(path, session_config)
    return [session.run(None, {name: tensor.numpy() for name, tensor in feed.items()}) for feed in feeds]
