"""One family is quantized, loaded, run and exported; every cell is a figure, `yes`, or a sentence that says why not."""

from __future__ import annotations

import json
import re
import resource
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.families.families import FAMILIES, MODULE, Family
from benchmarks.families.pairs import PLACES, random_pairs
from benchmarks.families.tiny import SPECIAL
from benchmarks.models.cells import DEFAULT, PLAIN
from quantize.artifact.verify import verify_artifact
from quantize.artifact.writer import ArtifactWriter
from quantize.checkpoint.opening import open_checkpoint
from quantize.errors import QuantizeError
from quantize.eval.demo import PLAIN_ACTIVATIONS, ROUND_TO_NEAREST
from quantize.export.directory import export_artifact
from quantize.graph.export import forward_switches, quiet
from quantize.graph.inputs import Input, example_inputs
from quantize.pipeline.context import RunContext
from quantize.pipeline.plan import make_plan
from quantize.pipeline.prepare import Prepared, prepare
from quantize.pipeline.quantize import Artifact, run_pipeline
from quantize.recipe.recipe import load_recipe

ROWS, TOKENS, UNSEEN, NEW_TOKENS = 64, 64, 64, 8
SECONDS, BYTES = 90, 16 << 30  # processor time and address space of one family
SCHEMES, RECIPES = ("W4A8", "W4A4"), (PLAIN, DEFAULT)
CACHED = 0.05  # relative difference of logits with and without the cache, below which they count as equal
AS_IT_IS = ROUND_TO_NEAREST | PLAIN_ACTIVATIONS  # plain rounding
CRASH = "CRASH: "  # the beginning of a cell of what should have been a sentence
YES = "yes"
Cells = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A family with what all its cells share.

    Attributes:
        model: a directory, or a module that transformers does not know.
        unseen: a batch of inputs that no run sees.
        expected: the float model's output on them.
        scratch: a directory for artifacts.
    """

    model: Path | nn.Module
    unseen: dict[str, Tensor]
    expected: Tensor
    scratch: Path

    def folder(self, scheme: str, recipe: str) -> Path:
        """Return where an artifact lies."""
        return self.scratch / f"{scheme} {recipe}"


def measure(name: str, scratch: Path, onnx: bool = True) -> Cells:
    """Return the cells of a family, plain data by the names that the table has as columns; without `onnx` but one."""
    start, family, cells = time.process_time(), FAMILIES[name], Cells()
    model = family.build()
    trial = Trial(scratch / "float", inputs_of(model, family, UNSEEN, 1), torch.empty(0), scratch)
    trial = replace(trial, expected=output_of(model, trial.unseen))
    if family.kind == MODULE:
        trial = replace(trial, model=model)
    else:
        model.save_pretrained(trial.model)  # type: ignore[operator]
    data = inputs_of(model, family, ROWS, 0)
    artifacts: dict[tuple[str, str], Artifact] = {}
    recipe = load_recipe(SCHEMES[0], {}, nsamples=ROWS, seqlen=TOKENS)
    prepared = attempt(cells, "quantized", lambda: prepare(trial.model, recipe, data))
    if prepared is not None:
        cells["quantized"] = prepared.plan.body.share
        cells["exported"] = prepared.program.export_error or YES
        cells["left"] = prepared.plan.body.record()["left"]
        for scheme in SCHEMES:
            for how in RECIPES:
                key = f"{scheme} {how}"
                found = attempt(cells, key, lambda s=scheme, h=how: quantized(trial, prepared, s, h))  # type: ignore[misc]
                if found is not None:
                    artifacts[scheme, how] = found
                    attempt(cells, key, lambda a=found: distance(trial, a))  # type: ignore[misc]
    if default := artifacts.get(("W4A8", DEFAULT)):
        run_and_export(cells, trial, default, artifacts.get(("W4A8", PLAIN)), onnx)
    return cells | {"seconds": time.process_time() - start}


def run_and_export(cells: Cells, trial: Trial, default: Artifact, plain: Artifact | None, onnx: bool) -> None:
    """Add the cells of what is done with the default artifact; compressed-tensors can hold the plain one alone."""
    attempt(cells, "load", lambda: YES if default.load() is not None else "")
    attempt(cells, "generate", lambda: generates(default.load(), trial))
    attempt(cells, "verify", lambda: YES if default.module is not None else verified(default))
    if onnx:
        attempt(cells, "onnx", lambda: exported(default, "onnx", trial.scratch))
    if plain is not None:
        attempt(cells, "compressed-tensors", lambda: exported(plain, "compressed-tensors", trial.scratch))


def attempt(cells: Cells, name: str, step: Callable[[], Any]) -> Any:
    """Set a cell to what a step returns, or to why it did not; return what it returned, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = step()
    except QuantizeError as error:
        said = re.sub(r"\S*/(?=float\b|W4A)", "", str(error))  # without the directory of this run
        cells[name] = said if "\n" not in said else f"{CRASH}several lines: {said.splitlines()[0]}"
        return None
    except Exception as error:  # that is what the table is to show
        cells[name] = f"{CRASH}{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None
    if isinstance(found, str | float):
        cells[name] = found
    return found


def quantized(trial: Trial, prepared: Prepared, scheme: str, how: str) -> Artifact:
    """Do what `quantize_model` does, with a graph and data that all runs of a family share."""
    recipe = load_recipe(scheme, {} if how == DEFAULT else AS_IT_IS, nsamples=ROWS, seqlen=TOKENS)
    with ArtifactWriter(trial.folder(scheme, how)) as writer:
        planned = replace(prepared, plan=make_plan(recipe, prepared.program))
        manifest = run_pipeline(planned, writer, RunContext(recipe.seed))
    return Artifact(writer.output, manifest, trial.model if isinstance(trial.model, nn.Module) else None)


def distance(trial: Trial, artifact: Artifact) -> float:
    """Return ‖quantized − float‖ / ‖float‖ of a loaded artifact's output on inputs that its run did not see."""
    difference = (output_of(artifact.load(), trial.unseen) - trial.expected).norm()
    return float(difference / trial.expected.norm())


def inputs_of(model: nn.Module, family: Family, count: int, seed: int) -> dict[str, Tensor]:
    """Return random inputs of a model, [count, ...] each: those that it takes by itself, or pairs of image and text."""
    if family.model_type in PLACES:
        return random_pairs(model, count, TOKENS, seed)
    limit = smallest_table(model) - (SPECIAL if family.kind != MODULE else 0)
    return random_inputs(example_inputs(model), count, limit, seed)


def smallest_table(model: nn.Module) -> int:
    """Return the rows of a model's tables of words, or any number if it has none."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return int(getattr(text, "vocab_size", 0) or min(tables, default=100))


def random_inputs(inputs: Mapping[str, Input], count: int, limit: int, seed: int) -> dict[str, Tensor]:
    """Return random inputs of a model, [count, ...] each, of `TOKENS` tokens; ids lie below `limit`."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, given in inputs.items():
        sizes = dict(zip(given.dynamic, (count, TOKENS), strict=False))
        shape = [sizes.get(axis, size) for axis, size in enumerate(given.example.shape)]
        real = given.example.is_floating_point()
        found[name] = (
            torch.randn(shape, generator=generator) if real else torch.randint(3, limit, shape, generator=generator)
        )
    return found


@torch.no_grad()
def output_of(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """Return a model's first output on a batch, float32."""
    torch.manual_seed(0)  # some models draw a mask
    with quiet():
        found = model(**given, **forward_switches(model))
    found = next(iter(found.values())) if isinstance(found, dict) else found
    first: Tensor = found if isinstance(found, Tensor) else found[0]
    return first.float()


@torch.no_grad()
def generates(model: Any, trial: Trial) -> str:
    """Return `yes` if a decoder generates with its cache what it gives without; `` for other models."""
    if list(trial.unseen) != ["input_ids"] or not getattr(model, "can_generate", lambda: False)():
        return ""
    ids = trial.unseen["input_ids"][:2, :16]
    difference = cache_difference(model, ids)
    if difference <= CACHED:
        return YES
    own = cache_difference(open_checkpoint(trial.model).load(), ids)
    return YES if own > CACHED else f"logits with the cache are {difference:.2f} from those without"


def cache_difference(model: Any, ids: Tensor) -> float:
    """Return how far the logits of generated tokens are from those of one pass over the whole sequence."""
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with quiet():
        made = model.generate(ids, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True, **given)
        whole = output_of(model, {"input_ids": made.sequences[:, :-1]})[:, ids.shape[1] - 1 :]
    steps = torch.stack(made.logits, 1).float()
    return float((steps - whole).norm() / whole.norm())


def verified(artifact: Artifact) -> str:
    """Return `yes` if an artifact is as it was written."""
    verify_artifact(artifact.directory, artifact.manifest["digest"])
    return YES


def exported(artifact: Artifact, target: str, scratch: Path) -> str:
    """Export an artifact, whose result the export compares with it."""
    export_artifact(artifact.directory, target, scratch / target)
    return YES


def main(name: str, scratch: Path, result: Path, onnx: bool) -> None:
    """Measure a family within the limits of time and memory, and write its cells as JSON."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    disable_progress_bar()
    found: Cells = {}
    attempt(found, "quantized", lambda: found.update(measure(name, scratch, onnx)))
    result.write_text(json.dumps(found))
