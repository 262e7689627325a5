"""A quantized transformers model as an ONNX file for ONNX Runtime on CPUs, compared with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from quantize.artifact import ArtifactWriter, as_json, load, read_manifest
from quantize.attention import has_kv_cache
from quantize.errors import QuantizeError, UsageError, reason
from quantize.export.comparison import distance, first_output, first_outputs, rewritten, with_float_activations
from quantize.export.onnx_linear import lower
from quantize.graph.inputs import example_inputs
from quantize.graph.program import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPSET = 23  # the first with Attention; from 25 on ONNX Runtime has no kernel for it and runs it as dozens of nodes
# Without VNNI, sums of two products of 8-bit integers saturate at 16 bits; in this mode weights are unsigned there.
SESSION_CONFIG = {"session.x64quantprecision": "1"}
FLOAT_ROUNDING = 1e-4  # relative; 1e-6 was measured on models without quantized activations


def export_onnx_directory(directory: Path, writer: ArtifactWriter, calibration: Path | None) -> dict[str, float]:
    """Write an artifact's `model.onnx`, `config.json` and `ort_config.json`.

    The last holds the session options that make the file exact on every CPU. Returns and raises as `export_onnx` does.
    """
    if calibration is not None:
        raise UsageError("ONNX Runtime takes ranges of activations as they come; leave --calibration out")
    if read_manifest(directory)["quantization"].get("prefix"):
        raise UsageError(f"{directory} has a prefix, which ONNX cannot run; quantize without `prefix` in the recipe")
    parity = export_onnx(load(directory), writer.directory)
    writer.write("config.json", (directory / "config.json").read_bytes())
    writer.write("ort_config.json", as_json({"session_config_entries": SESSION_CONFIG}))
    return parity


def export_onnx(model: PreTrainedModel, output_dir: Path) -> dict[str, float]:
    """Write `model.onnx` and prove it: ONNX Runtime must give what torch gives for the same operators.

    Inputs are `input_ids` and `attention_mask`, int64 [batch, sequence], both axes free; the output is `logits` if the
    model has that, else `last_hidden_state`. There is no KV cache. Weights beyond 1.5 GiB lie in a file of their own.

    Two right answers may differ: a sum that differs in its last bit moves an activation that lies between two grid
    points by a whole step, which moves others further on, up to the size of the activations' own rounding error.
    Measured: 0.65 of that error at most, over 140 runs of seven models; two independent roundings differ by √2 of it.

    Args:
        model: float32, in eval mode, its linears `QuantizedLinear`; left as it is.
        output_dir: an existing directory.

    Returns:
        What `parity` measured on two random inputs, the same for every call.

    Raises:
        UsageError: if the model takes other inputs, or ONNX Runtime has no kernel for a layer's scheme.
        QuantizeError: if rounding does not explain the difference between ONNX Runtime and torch.
    """
    if (names := list(example_inputs(model))) != ["input_ids"]:
        raise UsageError(f"the model takes {' and '.join(names)}; exported are models that take input_ids alone")
    if has_kv_cache(model):
        raise UsageError(
            "the model's keys and values are quantized, for which ONNX Runtime's Attention has no input; "
            "quantize without the table kv_cache, or run the artifact with quantize.load"
        )
    inputs = [random_inputs(model, batch=2, length=7), random_inputs(model, batch=3, length=11)]
    path = output_dir / "model.onnx"
    write(model, inputs[0], path)
    differences = parity(model, path, inputs)
    allowed = FLOAT_ROUNDING + 2 * differences["activations"]
    if not differences["emulation"] <= allowed:  # NaN is caught too
        raise QuantizeError(
            f"ONNX Runtime differs from torch by {differences['emulation']:.2g} of the output where rounding explains "
            f"{allowed:.2g} at most; do not use {path}, and report the model and the recipe"
        )
    return differences


def write(model: PreTrainedModel, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Trace the lowered model on `inputs` and save it.

    Raises:
        QuantizeError: it cannot be traced.
    """
    lowered = SingleOutput(rewritten(model, lower)).eval()
    with quiet(), torch.no_grad():
        name = "logits" if "logits" in model(**inputs) else "last_hidden_state"
        try:
            # Without `optimize`, whose fused RotaryEmbedding takes no tables of batch 1 and so fails at larger batches.
            program = torch.onnx.export(
                lowered,
                kwargs=dict(inputs),
                output_names=[name],
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                dynamic_shapes={key: {0: "batch", 1: "sequence"} for key in inputs},
            )
        except torch.onnx.OnnxExporterError as error:
            raise QuantizeError(f"the model cannot be traced for ONNX: {reason(error.__cause__ or error)}") from error
    assert program is not None
    onnxscript.optimizer.optimize(program.model)
    program.save(path)


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A file in ONNX Runtime on the CPU, exact on every CPU (`SESSION_CONFIG`)."""
    options = onnxruntime.SessionOptions()
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def parity(model: PreTrainedModel, path: Path, inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """How far ONNX Runtime is from torch: ‖difference‖ / ‖output‖, the largest over the inputs.

    Args:
        model: the model that was exported to `path`.
        path: the ONNX file.
        inputs: at least two, with different first tokens.

    Returns:
        emulation: distance from torch running what the operators do, rounding included.
        reference: distance from `model`, whose activation grids may be others than ONNX Runtime's.
        activations: the yardstick, how far `model` is from itself with floating-point activations.

    Raises:
        QuantizeError: if the graph's output does not depend on its input.
    """
    session = open_session(path)
    feeds = [{name: tensor.numpy() for name, tensor in feed.items()} for feed in inputs]
    outputs = [torch.from_numpy(session.run(None, feed)[0]) for feed in feeds]
    if torch.equal(outputs[0][0, 0], outputs[1][0, 0]):
        raise QuantizeError(f"{path} gives the same output for different inputs; report the model and the recipe")
    expected = first_outputs(model, inputs)
    return {
        "emulation": distance(outputs, first_outputs(rewritten(model, lower), inputs)),
        "reference": distance(outputs, expected),
        "activations": distance(first_outputs(rewritten(model, with_float_activations), inputs), expected),
    }


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens, the same for every call; the first row ends in padding."""
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


class SingleOutput(nn.Module):
    """`logits` of a model that has them, otherwise its first output."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [batch, sequence] twice → [batch, sequence, ...]."""
        return first_output(self.model(input_ids=input_ids, attention_mask=attention_mask))
