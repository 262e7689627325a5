"""NVFP4 checkpoints hold the largest input of each linear, where artifacts take the range of each token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.artifact.load import load
from quantize.calibration.tensor_samples import read_calibration
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.export.comparison import copy_with_replaced_linears, with_float_activations
from quantize.graph.inputs import example_inputs
from quantize.kernels.ops import nvfp4_global_scale
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.recipe.recipe import load_recipe

ROWS = 16  # of calibration data


def input_divisors(directory: Path, calibration: Path | None) -> dict[str, Tensor]:
    """Return `input_global_scale` for each quantized linear, float32 [1]: 448 · 6 / max |x| over calibration data.

    Args:
        directory: an artifact, whose recipe says how long rows are.
        calibration: a file as for quantizing; None takes the bundled prose.

    Raises:
        UsageError: there is no such file, or the model does not take its data.
        QuantizeError: the file is damaged, or has too little data.
    """
    model: Any = copy_with_replaced_linears(load(directory), with_float_activations)
    recipe, tokenize = load_recipe(None, directory / "recipe.toml"), load_tokenize(directory)
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    limit = min(recipe.nsamples, ROWS)
    samples = read_calibration(calibration, example_inputs(model), recipe.seqlen, limit, tokenize, vocabulary)
    largest: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            largest[path] = torch.zeros(1)
            module.register_forward_pre_hook(keep_largest(largest[path]))
    with torch.no_grad():
        for batch in samples.batches(1):
            model(**batch)
    return {path: nvfp4_global_scale(found).reciprocal() for path, found in largest.items()}


def keep_largest(found: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that raises `found`, [1], to the largest magnitude of a module's input."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        del module
        torch.maximum(found, arguments[0].abs().max().float(), out=found)

    return hook
