"""A quantized transformers model as an ONNX file for ONNX Runtime on CPUs, compared with torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir

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
from quantize.export.onnx.parity import SESSION_CONFIG, WITH_VNNI, onnx_parity
from quantize.export.onnx.precision import precision_counts
from quantize.export.onnx.rewrites import rewrite
from quantize.export.onnx.tracing import traced
from quantize.graph.export import quiet
from quantize.nn.attention import has_kv_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLOAT_ROUNDING = 1e-4  # relative; 1e-6 was measured on models without quantized activations
QDQ_ACCURACY = "session.qdq_matmulnbits_accuracy_level"


def export_onnx(
    model: PreTrainedModel, output_dir: Path, qdq: bool = False, hybrid: bool = False, large: int = LARGE
) -> dict[str, float]:
    """Write `model.onnx` and prove it: ONNX Runtime must give what torch gives for the same operators.

    An encoder-decoder becomes `encoder_model.onnx` and `decoder_model.onnx`, which are proved one behind the other.

    Beside it lies `ort_config.json` with the session options that make it exact on every CPU, those that are better
    `with_vnni` instructions, and `precisions`: how many products run in which precision.

    What goes in and out is said by `Decoder` for causal language models, by `EncoderWithCrossKV` and `DecoderWithPast`
    for encoder-decoders, by `SinglePassModel` for all others. Weights of more than `large` bytes lie in
    `model.onnx.data`, those that two files read in `shared.onnx.data`.

    Two right answers may differ: a sum that differs in its last bit moves an activation that lies between two grid
    points by a whole step, which moves others further on, up to the size of the activations' own rounding error.
    Measured: 0.65 of that error at most, over 140 runs of seven models, and 1.0 on MiniLM at W4A8;
    two independent roundings differ by √2 of it.

    Args:
        model: float32, in eval mode, its linears `QuantizedLinear`; left as it is.
        output_dir: an existing directory.
        qdq: standard operators only, for other runtimes too; 4-bit weights are dequantized in front of a product, and
            8-bit activations of such a product are up to the runtime: ONNX Runtime does as `ort_config.json` says.
        hybrid: the products of W4A8 language models twice, as `HybridLinear` has them: prompts run faster.
        large: bytes.

    Returns:
        What `onnx_parity` measured on two random inputs of three shapes, the same for every call.

    Raises:
        UsageError: if ONNX Runtime has no kernel for a layer's scheme, or for what the model keeps of earlier tokens;
            or a hybrid of what has only one form.
        QuantizeError: if rounding does not explain the difference between ONNX Runtime and torch.
    """
    if has_kv_cache(model):
        raise UsageError(str(QUANTIZED_CACHE))
    if hybrid and qdq:
        raise UsageError("a hybrid is made of operators of ONNX Runtime alone; give --qdq or --hybrid")
    interface = interface_of(model, hybrid)
    made = {name: lowered(part, qdq) for name, part in interface.files().items()}
    save({name: model for name, (model, _) in made.items()}, output_dir, large)
    config = joined([config for _, config in made.values()])
    (output_dir / "ort_config.json").write_text(as_json(config))
    differences = onnx_parity(interface, output_dir, config["session_config_entries"])
    allowed = FLOAT_ROUNDING + 2 * differences["activations"]
    if not differences["emulation"] <= allowed:  # NaN is caught too
        raise QuantizeError(
            f"ONNX Runtime differs from torch by {differences['emulation']:.2g} of the output where rounding explains "
            f"{allowed:.2g} at most; do not use {output_dir}, and report the model and the recipe"
        )
    return differences


def interface_of(model: PreTrainedModel, hybrid: bool = False) -> Interface:
    """What the file of a model takes and gives, and what its linears become."""
    with quiet():
        if hybrid:
            return hybrid_decoder(model)
        if is_seq2seq(model):
            return encoder_decoder(model)
        return Decoder(model) if is_causal_lm(model) else SinglePassModel(model)


def lowered(interface: Interface, qdq: bool = False) -> tuple[onnx_ir.Model, dict[str, dict[str, Any]]]:
    """Lower and trace a model.

    Returns:
        What becomes the file, and its settings.
        session_config_entries: the session options to run it with.
        with_vnni: those that are better on CPUs with VNNI or AMX instructions.
        precisions: precision → products that run in it; of a hybrid for few tokens, and `precisions_prompts` for many.

    Raises:
        QuantizeError: it cannot be traced.
    """
    graphs = [traced(part) for part in interface.graphs()]
    precisions = dict(zip(("precisions", "precisions_prompts"), map(precision_counts, graphs), strict=False))
    levels = [level for model in graphs for level in accuracy_levels(model)]
    for model in graphs:
        rewrite(model, portable=qdq)
        leave_unread_out(model, interface)
    model = branch_on_length(*graphs) if len(graphs) > 1 else graphs[0]
    # ONNX Runtime takes a product of dequantized weights for one that may quantize its activations, unless told.
    entries = SESSION_CONFIG | ({QDQ_ACCURACY: str(max(levels))} if qdq and levels else {})
    return model, {"session_config_entries": entries, "with_vnni": WITH_VNNI, **precisions}


def accuracy_levels(model: onnx_ir.Model) -> list[int]:
    """Of all `MatMulNBits`."""
    return [int(node.attributes["accuracy_level"].value) for node in model.graph if node.op_type == "MatMulNBits"]


def joined(configs: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The settings of several files: the most exact options, and their products together."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("session_config_entries", "with_vnni"):
        found[name] = {key: value for config in configs for key, value in config[name].items()}
    for name in ("precisions", "precisions_prompts"):
        products = sum((Counter(config.get(name, {})) for config in configs), Counter[str]())
        found |= {name: dict(sorted(products.items()))} if products else {}
    return found


def leave_unread_out(model: onnx_ir.Model, interface: Interface) -> None:
    """Take inputs that the graph does not read off a file, in place, where its interface says so.

    Raises:
        QuantizeError: it reads what it must not.
    """
    for value in [value for value in model.graph.inputs if value.name in interface.optional + interface.unread]:
        if not value.uses():
            model.graph.inputs.remove(value)
        elif value.name in interface.unread:
            raise QuantizeError(f"what the file should give once depends on {value.name}; run it with quantize.load")
