"""What becomes of each tensor of a checkpoint is decided by names, shapes and some rows, before anything is rounded."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.remote_shards import SHARDS
from quantize.errors import UsageError
from quantize.export.compressed_tensors.format import WORD
from quantize.export.compressed_tensors.obstacles import unplaced_schemes
from quantize.export.model_free.forms import ARTIFACT, Form, Opened
from quantize.export.model_free.grids import find_grids, grid_note
from quantize.export.model_free.linears import StoredLinear, find_linears
from quantize.export.model_free.orientation import transposed_weights
from quantize.export.model_free.shapes import file_of, shapes_in, shapes_of
from quantize.formats import get_format
from quantize.pipeline.grids import decisive, regrouped, with_format_of
from quantize.pipeline.layer_schemes import describe_fallbacks, select
from quantize.pipeline.plan import grid_fits
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.files import read_recipe
from quantize.recipe.merging import merge
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.recipe.validation import validated
from quantize.scheme.scheme import Scheme

SHAPE, GLOBAL_SCALE = "weight_shape", "global_scale"  # parts that a matrix has once, however many rows it has
PLAIN = {"passes": [], "tables": [], "quantizer": {"name": "rtn", "mse": True}}


@dataclass(frozen=True)
class ModelFreePlan:
    """The decisions of a run without the model.

    Attributes:
        form: what is written.
        opened: the files, by the names that the form has for tensors, and the model's class if it is known.
        recipe: the resolved recipe.
        quantizer: how weights are rounded.
        linears: the linears to round, by the name of the tensor that holds them.
        schemes: the scheme of each linear, by path.
        shapes: the shapes of all tensors as floats, by name.
        reasons: the weights that stay in floating point, each with the reason.
        kept: the paths of the linears that are kept as they are if their whole weight lies on a grid.
        notes: what a person should know, each in a sentence.
    """

    form: Form
    opened: Opened
    recipe: Recipe
    quantizer: RoundToNearest
    linears: Mapping[str, list[StoredLinear]]
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, ...]]
    reasons: Mapping[str, str]
    kept: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return self.opened.checkpoint

    @property
    def of_stacks(self) -> list[StoredLinear]:
        """The linears that experts of stacks become."""
        return [x for linears in self.linears.values() for x in linears if x.expert is not None]

    def shards(self) -> dict[str, list[str]]:
        """Return the names of the tensors that each file of the result is made of, by the name of the file."""
        found = defaultdict[str, list[str]](list)
        for name in self.shapes:
            found[file_of(self.checkpoint, name).with_suffix(".safetensors").name].append(name)
        return dict(sorted(found.items()))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors that one becomes, by the names under which they are stored, on the meta device."""
        if name not in self.linears:
            return {name: torch.empty(self.shapes[name], dtype=self.dtype(name), device="meta")}
        made = {}
        for linear in self.linears[name]:
            parts = sample(self.form, self.schemes[linear.path], linear.columns, self.dtype(name))
            for part, (shape, dtype) in parts.items():
                if part == GLOBAL_SCALE and linear.experts is not None:
                    shape = (linear.all_rows, 1)
                elif part not in (SHAPE, GLOBAL_SCALE):
                    shape = (-(-linear.all_rows * shape[0] // WORD), *shape[1:])
                made[f"{linear.path}.{part}"] = torch.empty(shape, dtype=dtype, device="meta")
        return made

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is stored as it is, and in which the scales of a weight are."""
        if name in self.linears or self.checkpoint.is_encoded(name):
            return self.checkpoint.dtype_of(name)
        return self.checkpoint.on_meta(name).dtype

    def describe(self) -> str:
        """Return what a run would do, in lines."""
        counts = Counter(scheme.label for scheme in self.schemes.values())
        size = sum(x.nbytes for name in self.shapes for x in self.tensors(name).values())
        why, remote = Counter(self.reasons.values()), self.checkpoint.remote
        return "\n".join([
            f"{', '.join(f'{count} linears to {label}' for label, count in counts.items())}, in {len(self.shards())} "
            f"files, rounded by {self.quantizer.name} without the model, as {self.form.name}",
            *self.notes,
            *(f"{count} weights stay in floating point: {reason}" for reason, count in why.items()),
            f"artifact: {size:,} bytes, where the model has {self.checkpoint.stored_bytes():,}",
            *([f"{remote.most_bytes:,} more at most for files of the model, {SHARDS} at a time"] if remote else []),
            *([f"{sum(remote.sizes.values()):,} bytes are fetched, each file once"] if remote else []),
        ])  # fmt: skip


def recipe_without_model(
    form: Form, scheme: str | None, changes: Path | Mapping[str, Any] | None, target: str | None, **settings: Any
) -> Recipe:
    """Load a recipe that can be followed without the model and written in a form; arguments as in `load_recipe`.

    Without a target the form's holds.

    Raises:
        UsageError: it needs the model's activations, or the files have no place for what it asks for.
    """
    given = read_recipe(changes) if isinstance(changes, Path) else dict(changes or {})
    recipe = load_recipe(scheme, merge(PLAIN, given), target=target or form.target, **settings)
    kinds = ("passes", "tune", "prune", "prefix", "kv_cache", "tables")
    asked = [name for name in kinds if getattr(recipe, name)]
    if recipe.quantizer["name"] != RoundToNearest.name:
        asked.append("quantizer")
    if asked:
        raise UsageError(
            f"recipe: {' and '.join(asked)} cannot be followed without the model, whose weights are rounded one by "
            "one; leave them out, or leave --model-free out"
        )
    if get_format(recipe.weights.format).has_global_scale and not form.is_artifact:
        raise UsageError(
            f"{recipe.scheme} as {form.name} needs ranges of activations, which only the model gives; give --format "
            f"{ARTIFACT}, or MXFP4 or W4A16, or leave --model-free out"
        )
    return recipe


def plan_without_model(form: Form, opened: Opened, recipe: Recipe) -> ModelFreePlan:
    """Decide for each tensor of some files what becomes of it.

    Raises:
        UsageError: nothing is left to round, a pattern matches nothing, a group size fits neither the columns nor the
            grid of the weights, or the files have no place for what the recipe asks for.
    """
    checkpoint, model = opened.checkpoint, opened.model
    by_class = form.is_artifact and model is not None
    shapes = dict(shapes_in(checkpoint, model) if model is not None and by_class else shapes_of(checkpoint))
    transposed = {} if model is None else transposed_weights(model, checkpoint, by_class)
    encoded = [name for name in shapes if checkpoint.is_encoded(name)]
    linears, reasons = find_linears(shapes, encoded, checkpoint.config, transposed, splits=not form.is_artifact)
    others = [name.removesuffix(".weight") for name in reasons]
    chosen = recipe.model_copy(update={"ignore": (*(recipe.ignore or ()), *recipe.ignore_also), "ignore_also": ()})
    schemes, ignored = select(chosen, linears, others)
    left = [linear for linear in linears if linear.path in schemes]
    if not left:
        raise UsageError(f"{checkpoint.directory} holds no weight to round in numbered layers")
    if not form.is_artifact and (turned := [x for x in left if x.transposed and x.expert is None]):
        raise UsageError(
            f"{turned[0].weight} {list(shapes[turned[0].weight])} is stored as [in, out], for which {form.name} has no "
            f"place; give --format {ARTIFACT}"
        )
    quantizer = validated(
        lambda: RoundToNearest(**{k: v for k, v in chosen.quantizer.items() if k != "name"}), "recipe"
    )
    looks = checkpoint.has_weights and not recipe.requantize
    grids = {} if not looks else dict(find_grids(form, checkpoint, left, schemes))
    found = decisive(grids, {linear.path: linear.all_rows * linear.columns for linear in left})
    held = dict[str, int]()
    if found and form.is_artifact:
        chosen, held = with_format_of(chosen, grids)
    elif found:
        held = {path: grid.size for path, grid in grids.items() if grid.held and not grid.format}
    if held:
        chosen = regrouped(chosen, held, select(chosen, linears, others)[0], found)
        schemes, _ = select(chosen, linears, others)
    kept = frozenset(path for path, size in held.items() if grid_fits(size, schemes[path].weights))
    if not form.is_artifact and (unplaced := dict(unplaced_schemes(schemes.values()))):
        instead = " and ".join(unplaced.values())
        raise UsageError(f"{form.name} has no place for {' or '.join(unplaced)}; give {instead}")
    notes = [*checkpoint.notes, *([grid_note(form, found, grids, held, bool(kept))] if found else [])]
    notes += describe_fallbacks(chosen, schemes, left)
    by_weight = defaultdict[str, list[StoredLinear]](list)
    for linear in left:
        by_weight[linear.weight].append(linear)
    reasons |= {name: why for name, why in ignored.items() if name not in by_weight}
    return ModelFreePlan(form, opened, chosen, quantizer, by_weight, schemes, shapes, reasons, kept, tuple(notes))


@functools.lru_cache
def sample(
    form: Form, scheme: Scheme, columns: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of the tensors that a weight of `WORD` rows becomes."""
    weight = RoundToNearest().quantize(torch.zeros(WORD, columns), scheme.weights, None, dtype)
    return {part: (tuple(x.shape), x.dtype) for part, x in form.parts(weight, scheme).items()}
