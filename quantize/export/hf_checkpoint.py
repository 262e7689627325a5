"""Targets that are checkpoints of transformers share how shards are converted, and how checkpoints are run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console
from torch import Tensor

from quantize.artifact.load import read_linear, read_table
from quantize.artifact.quantization_config import linear_scheme
from quantize.artifact.verify import read_probe
from quantize.artifact.writer import PROBE
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.tensor_files import index_tensors, read_tensor
from quantize.errors import QuantizeError
from quantize.export.comparison import first_outputs
from quantize.export.outline import Outline
from quantize.formats import get_format
from quantize.graph.export import quiet
from quantize.graph.refusal import place_of
from quantize.nn.quantized_embedding import dequantized_table, table_of
from quantize.nn.quantized_experts import QuantizedExperts
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.progress import track

T = TypeVar("T")
FEW_NUMBERS = 8  # 2 (1 + 8/n) is passed by one in 1000 ratios of two independent random differences of n numbers
NOT_LOADED = {  # what transformers 5.24 says → what it means
    "has no attribute 'weight'": "its code reads the weight of a linear, which a packed linear does not have",
    "you can only have one to many": "it splits or joins tensors of this class, and no compressed ones",
}
ROUNDING = 64  # last bits, relative to the output: a sum in another order may differ by so much


class NotLoadedError(QuantizeError):
    """Transformers cannot load a checkpoint."""


def shards(
    directory: Path,
    outline: Outline,
    replace: Callable[[str, QuantizedLinear | QuantizedExperts], Mapping[str, T]],
    console: Console | None = None,
    replace_table: Callable[[Tensor, Tensor], Tensor | T] | None = None,
) -> Iterator[tuple[str, dict[str, Tensor | T]]]:
    """Yield the files of an artifact with each quantized linear or stack converted, one file in memory at a time.

    Arguments as in `converted`.
    """
    for file, parts in itertools.groupby(
        converted(directory, outline, replace, console, replace_table), lambda item: item[0]
    ):
        yield file, {name: tensor for _, tensors in parts for name, tensor in tensors.items()}


def converted(
    directory: Path,
    outline: Outline,
    replace: Callable[[str, QuantizedLinear | QuantizedExperts], Mapping[str, T]],
    console: Console | None = None,
    replace_table: Callable[[Tensor, Tensor], Tensor | T] | None = None,
) -> Iterator[tuple[str, Mapping[str, Tensor | T]]]:
    """Yield what the files of an artifact hold, each with the file's name: tensors, or what a linear is made into.

    Args:
        directory: an artifact.
        outline: the artifact's outline.
        replace: maps a path and a linear or a stack of experts, as `stored_linear` reads it, to the target's tensors.
        console: the console that shows progress; None shows nothing.
        replace_table: maps the integers [V, K] and scales [V, 1] of a table of words in 8 bits to the target's tensor;
            None makes a table in the dtype in which the float model has it.
    """
    files, modules = index_tensors(directory, PROBE), outline.settings["modules"]
    tables = outline.settings.get("tables", ())
    for file in track(sorted(set(files.values())), "writing", lambda file: file.name, console):
        for name in (name for name, path in files.items() if path == file):
            path, _, leaf = name.rpartition(".")
            if path in modules and leaf == "qweight":
                yield file.name, replace(path, stored_linear(path, outline, files))
            elif path in tables and leaf == "qweight":
                qweight, scale = read_table(path, files)
                table_of(qweight, scale).check(path)
                own = replace_table or (lambda q, scale: dequantized_table(q, scale, scale.dtype))
                yield file.name, {f"{path}.weight": own(qweight, scale)}
            elif path not in (*modules, *tables) and path.rpartition(".transform.")[0] not in modules:
                yield file.name, {name: read_tensor(file, name)}


def stored_linear(path: str, outline: Outline, files: dict[str, Path]) -> QuantizedLinear | QuantizedExperts:
    """Read a quantized linear or stack, with bias and scales in the dtype that the float model's weight was stored in.

    Scales have that dtype already, except for those of FP4, where the config tells the dtype.
    """
    is_fp4 = get_format(linear_scheme(outline.settings, path).weights.format).element == "e2m1"
    dtype = outline.dtype if is_fp4 else read_tensor(files[f"{path}.scale"], f"{path}.scale").dtype
    return read_linear(path, outline.settings, files, dtype)


def probe_inputs(directory: Path) -> list[dict[str, Tensor]]:
    """Return an artifact's two probes, each as the inputs of a call."""
    probe, _ = read_probe(directory)
    return [dict(zip(probe, row, strict=True)) for row in zip(*(x.split(1) for x in probe.values()), strict=True)]


def outputs_of(
    directory: Path,
    inputs: list[dict[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    rounds_activations: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Return the first outputs of a checkpoint, loaded in transformers.

    Args:
        directory: the directory of the checkpoint.
        inputs: the inputs of each call.
        dtype: the dtype in which it runs.
        rounds_activations: whether the package compressed-tensors rounds activations, where the checkpoint says so.
        options: options of `from_pretrained`.

    Raises:
        NotLoadedError: transformers cannot load the checkpoint.
    """
    cls = getattr(transformers, str(read_config(directory)["architectures"][0]))
    own = [{name: x.to(dtype) if x.is_floating_point() else x for name, x in feed.items()} for feed in inputs]
    with quiet():
        try:
            model = cls.from_pretrained(directory, dtype=dtype, local_files_only=True, **options)
        except Exception as error:  # any error of transformers and the packages it uses
            raise NotLoadedError(
                f"transformers cannot load the checkpoint that was written of a {cls.__name__}, as "
                f"{why_not_loaded(error)}; run the artifact itself with quantize.load, and --verbose shows the error"
            ) from error
        if not rounds_activations:
            model.apply(disable_rounding)
        return first_outputs(model.eval().to(dtype), own)  # experts that were unpacked have another dtype


def why_not_loaded(error: Exception) -> str:
    """Return a clause that says why transformers cannot load a checkpoint, and which line of its code said so."""
    why = next((why for said, why in NOT_LOADED.items() if said in str(error)), f"it meets a {type(error).__name__}")
    where = place_of(error)
    return f"{why}, {where}" if where else why


def disable_rounding(module: Any) -> None:
    """Let a module compute with activations as they are; compressed-tensors 0.20, `lifecycle/forward.py`."""
    module.quantization_enabled = False


def check_difference(found: float, eps: float, rounding: float, outputs: Sequence[Tensor]) -> None:
    """Check that what transformers computes differs from the artifact by no more than rounding explains.

    Args:
        found: the largest relative difference of some outputs.
        eps: the last bit of what is computed in.
        rounding: how far rounding moves the outputs, which two right answers may do independently.
        outputs: the outputs; of few numbers the size of a random difference says less, and more is allowed.

    Raises:
        QuantizeError: rounding does not explain the difference.
    """
    fewest = min(y.numel() for y in outputs)
    allowed = ROUNDING * eps + 2 * (1 + FEW_NUMBERS / fewest) * rounding
    if not found <= allowed:  # NaN is caught too
        raise QuantizeError(
            f"transformers differs from the artifact by {found:.2g} of the output, and rounding explains at most "
            f"{allowed:.2g}; report the model and the recipe"
        )
