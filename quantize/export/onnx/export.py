"""A quantized transformers model is exported as an ONNX file for ONNX Runtime on CPUs, and compared with torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir
from rich.console import Console
from torch import Tensor, nn

from quantize.artifact.writer import as_json
from quantize.errors import QuantizeError, UsageError
from quantize.export.onnx.decoder import Decoder, is_causal_lm
from quantize.export.onnx.encoder import SinglePassModel
from quantize.export.onnx.encoder_decoder import encoder_decoder
from quantize.export.onnx.encoder_decoder_parts import is_seq2seq
from quantize.export.onnx.external_data import LARGE, save
from quantize.export.onnx.hybrid import branch_on_length, hybrid_decoder
from quantize.export.onnx.interface import Interface
from quantize.export.onnx.lowering import QUANTIZED_CACHE
from quantize.export.onnx.parity import SESSION_CONFIG, WITH_VNNI, onnx_parity, parity_steps
from quantize.export.onnx.precision import precision_counts
from quantize.export.onnx.rewrites import rewrite
from quantize.export.onnx.tracing import traced
from quantize.graph.export import quiet
from quantize.nn.attention import has_kv_cache
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.progress import named_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT_ROUNDING = 1e-4  # relative; on models without quantized activations the largest difference measured was 1e-6
WRITING = "writing the weights"
QDQ_ACCURACY = "session.qdq_matmulnbits_accuracy_level"


def export_onnx(
    model: PreTrainedModel,
    output_dir: Path,
    qdq: bool = False,
    hybrid: bool = False,
    large: int = LARGE,
    samples: Sequence[Mapping[str, Tensor]] = (),
    console: Console | None = None,
) -> dict[str, float]:
    """Write `model.onnx` and check that ONNX Runtime computes what torch computes for the same operators.

    An encoder-decoder becomes `encoder_model.onnx` and `decoder_model.onnx`, which are checked one after the other.

    `ort_config.json` has the session options that make ONNX Runtime exact on every CPU, the options that are better
    `with_vnni` instructions, and `precisions`, the number of products that run in each precision.

    Inputs and outputs are described by `Decoder` for causal language models, by `EncoderWithCrossKV` and
    `DecoderWithPast` for encoder-decoders, and by `SinglePassModel` for all others. Weights of more than `large` bytes
    are in `model.onnx.data`, and weights that two files read are in `shared.onnx.data`.

    Two right answers may differ: a sum that differs in its last bit can move an activation between two grid points by a
    whole step. That moves others later on, in all by up to the activations' own rounding error. The largest difference
    measured was 0.65 of that error over 140 runs of seven models, and 1.0 on MiniLM at W4A8; two independent
    roundings differ by √2 of it.

    Args:
        model: a float32 model in eval mode whose linears are `QuantizedLinear`; it is not changed.
        output_dir: an existing directory.
        qdq: use standard operators only, for other runtimes too. 4-bit weights are dequantized before a product, and
            the runtime decides about its 8-bit activations: ONNX Runtime does as `ort_config.json` says.
        hybrid: store the products of W4A8 language models twice, as in `HybridLinear`, so that prompts run faster.
        large: the bytes of weights above which they get a file of their own.
        samples: real samples, each as the model takes it, [1, tokens]; the tokens' distributions of a causal language
            model or of an encoder-decoder are compared on them.
        console: the console that shows progress; None shows nothing.

    Returns:
        What `onnx_parity` measured on two random inputs of three shapes, which are the same in every call, and on the
        samples.

    Raises:
        UsageError: ONNX Runtime has no kernel for a layer's scheme, or the file has no inputs for what the model keeps
            of earlier tokens, or a hybrid is asked for and the model has no W4A8 linears.
        QuantizeError: rounding does not explain the difference between ONNX Runtime and torch.
    """
    if has_kv_cache(model):
        raise UsageError(str(QUANTIZED_CACHE))
    if hybrid and qdq:
        raise UsageError("a hybrid file needs operators that only ONNX Runtime has; give --qdq or --hybrid, not both")
    if qdq and any(is_float_zero(module) for module in model.modules()):
        raise UsageError(
            "standard operators have no zero points in floating point, as q4_1 weights have; leave --qdq out"
        )
    interface = interface_of(model, hybrid)
    for part in (interface, *interface.files().values()):
        part.standard = qdq
    real = [feed for sample in samples if (feed := interface.feed_of(sample)) is not None]
    tracing = {name: f"tracing {name}" for name in interface.files()}
    with named_steps([*tracing.values(), WRITING, *parity_steps(real)], "exporting", console) as begin:
        made = {}
        for name, part in interface.files().items():
            begin(tracing[name])
            made[name] = lowered(part, qdq)
        begin(WRITING)
        save({name: model for name, (model, _) in made.items()}, output_dir, large)
        config = joined([config for _, config in made.values()])
        (output_dir / "ort_config.json").write_text(as_json(config))
        differences = onnx_parity(interface, output_dir, config["session_config_entries"], real, begin)
    allowed = FLOAT_ROUNDING + 2 * differences["activations"]
    if not differences["emulation"] <= allowed:  # NaN is caught too
        raise QuantizeError(
            f"ONNX Runtime differs from torch by {differences['emulation']:.2g} of the output, and rounding "
            f"explains at most {allowed:.2g}; run the artifact with quantize.load, and report the model and the recipe"
        )
    return differences


def interface_of(model: PreTrainedModel, hybrid: bool = False) -> Interface:
    """Return the interface of a model's file, which also says what its linears become."""
    with quiet():
        if hybrid:
            return hybrid_decoder(model)
        if is_seq2seq(model):
            return encoder_decoder(model)
        return Decoder(model) if is_causal_lm(model) else SinglePassModel(model)


def is_float_zero(module: nn.Module) -> bool:
    """Return whether a module is a quantized linear whose zero points are no integers."""
    zero_point = module.zero_point if isinstance(module, QuantizedLinear) else None
    return zero_point is not None and zero_point.is_floating_point()


def lowered(interface: Interface, qdq: bool = False) -> tuple[onnx_ir.Model, dict[str, dict[str, Any]]]:
    """Lower and trace a model.

    Returns:
        The model to write, and its settings:
        session_config_entries: the session options to run it with.
        with_vnni: the options that are better on CPUs with VNNI or AMX instructions.
        precisions: precision → products that run in it; for a hybrid with few tokens, and `precisions_prompts` with
            many.

    Raises:
        QuantizeError: the model cannot be traced.
    """
    graphs = [traced(part) for part in interface.graphs()]
    precisions = dict(zip(("precisions", "precisions_prompts"), map(precision_counts, graphs), strict=False))
    levels = [level for model in graphs for level in accuracy_levels(model)]
    for model in graphs:
        rewrite(model, portable=qdq)
        leave_unread_out(model, interface)
    model = branch_on_length(*graphs) if len(graphs) > 1 else graphs[0]
    # Unless told otherwise, ONNX Runtime may quantize the activations of a product of dequantized weights.
    entries = SESSION_CONFIG | ({QDQ_ACCURACY: str(max(levels))} if qdq and levels else {})
    return model, {"session_config_entries": entries, "with_vnni": WITH_VNNI, **precisions}


def accuracy_levels(model: onnx_ir.Model) -> list[int]:
    """Return the accuracy levels of all `MatMulNBits`."""
    return [int(node.attributes["accuracy_level"].value) for node in model.graph if node.op_type == "MatMulNBits"]


def joined(configs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the settings for several files together: the most exact options, and the products of all files."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("session_config_entries", "with_vnni"):
        found[name] = {key: value for config in configs for key, value in config[name].items()}
    for name in ("precisions", "precisions_prompts"):
        products = sum((Counter(config.get(name, {})) for config in configs), Counter[str]())
        found |= {name: dict(sorted(products.items()))} if products else {}
    return found


def leave_unread_out(model: onnx_ir.Model, interface: Interface) -> None:
    """Remove inputs that the graph does not read, in place, as far as the interface says that they may be removed.

    Raises:
        QuantizeError: the graph reads an input that it must not read.
    """
    for value in [value for value in model.graph.inputs if value.name in interface.optional + interface.unread]:
        take_sizes_elsewhere(model, value)
        if not value.uses():
            model.graph.inputs.remove(value)
        elif value.name in interface.unread:
            raise QuantizeError(f"the encoder's outputs depend on {value.name}; run the model with quantize.load")


def take_sizes_elsewhere(model: onnx_ir.Model, value: onnx_ir.Value) -> None:
    """Read each size of an input, in place, off the first other input that has the same one, as far as there is one.

    Several inputs have the size of a batch, and the exporter does not always choose the same of them.
    """
    for node, _ in list(value.uses()):
        axis = node.attributes.get_int("start", 0)
        if node.op_type != "Shape" or node.attributes.get_int("end", -1) != axis + 1 or value.shape is None:
            continue
        size = value.shape[axis]
        others = [
            (x, list(x.shape).index(size)) for x in model.graph.inputs if x is not value and size in (x.shape or ())
        ]
        if isinstance(size, onnx_ir.SymbolicDim) and others:
            other, place = others[0]
            node.replace_input_with(0, other)
            node.attributes["start"] = onnx_ir.AttrInt64("start", place)
            node.attributes["end"] = onnx_ir.AttrInt64("end", place + 1)
