"""What becomes of each tensor of a checkpoint is decided by names, shapes and some rows, before anything is rounded."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.remote_shards import SHARDS
from quantize.errors import UsageError
from quantize.export.compressed_tensors.format import NAME, WORD, is_packed, stored
from quantize.export.compressed_tensors.model_free.linears import StoredLinear, find_linears
from quantize.export.compressed_tensors.obstacles import unplaced_schemes
from quantize.formats import get_format
from quantize.pipeline.grids import FIRST, ROWS, Grid, decisive, grid_of, regrouped
from quantize.pipeline.layer_schemes import describe_fallbacks, select
from quantize.pipeline.plan import grid_fits
from quantize.quantizers.rtn import RoundToNearest
from quantize.recipe.files import read_recipe
from quantize.recipe.merging import merge
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.recipe.validation import validated
from quantize.scheme.scheme import Scheme

TARGET = "vllm"  # whose recipes have no zero points and no clipping, which every reader of the files knows
PLAIN = {"passes": [], "quantizer": {"name": "rtn", "mse": True}}


@dataclass(frozen=True)
class ModelFreePlan:
    """The decisions of a run without the model.

    Attributes:
        checkpoint: the files, by the names of the tensors in them.
        recipe: the resolved recipe.
        quantizer: how weights are rounded.
        linears: the linears to round, by the name of the tensor that holds them.
        schemes: the scheme of each linear, by path.
        shapes: the shapes of all tensors as floats, by name.
        reasons: the weights that stay in floating point, each with the reason.
        kept: the paths of the linears that are kept as they are if their whole weight lies on a grid.
        notes: what a person should know, each in a sentence.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    quantizer: RoundToNearest
    linears: Mapping[str, list[StoredLinear]]
    schemes: Mapping[str, Scheme]
    shapes: Mapping[str, tuple[int, ...]]
    reasons: Mapping[str, str]
    kept: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())

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
            parts = sample(self.schemes[linear.path], linear.columns, self.dtype(name))
            for part, (shape, dtype) in parts.items():
                own = shape if part == "weight_shape" else (-(-linear.rows * shape[0] // WORD), *shape[1:])
                made[f"{linear.path}.{part}"] = torch.empty(own, dtype=dtype, device="meta")
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
            f"files, rounded by {self.quantizer.name} without the model, as {NAME}",
            *self.notes,
            *(f"{count} weights stay in floating point: {reason}" for reason, count in why.items()),
            f"artifact: {size:,} bytes, where the model has {self.checkpoint.stored_bytes():,}",
            *([f"{remote.most_bytes:,} more at most for files of the model, {SHARDS} at a time"] if remote else []),
        ])  # fmt: skip


def recipe_without_model(scheme: str | None, changes: Path | Mapping[str, Any] | None, **settings: Any) -> Recipe:
    """Load a recipe that can be followed without the model; arguments as in `load_recipe`.

    Raises:
        UsageError: it needs the model's activations, or the files have no place for what it asks for.
    """
    given = read_recipe(changes) if isinstance(changes, Path) else dict(changes or {})
    recipe = load_recipe(scheme, merge(PLAIN, given), target=TARGET, **settings)
    needs = [name for name in ("passes", "tune", "prune", "prefix", "kv_cache") if getattr(recipe, name)]
    if recipe.quantizer["name"] != RoundToNearest.name:
        needs.append("quantizer")
    if needs:
        raise UsageError(
            f"recipe: {' and '.join(needs)} cannot be followed without the model, whose weights are rounded one by "
            "one; leave them out, or leave --model-free out"
        )
    if get_format(recipe.weights.format).has_global_scale:
        raise UsageError(
            f"{recipe.scheme} needs ranges of activations, which only the model gives; give MXFP4 or W4A16, or leave "
            "--model-free out"
        )
    return recipe


def plan_without_model(checkpoint: Checkpoint, recipe: Recipe) -> ModelFreePlan:
    """Decide for each tensor of some files what becomes of it.

    Raises:
        UsageError: nothing is left to round, a pattern matches nothing, a group size fits neither the columns nor the
            grid of the weights, or the files have no place for what the recipe asks for.
    """
    shapes = dict(shapes_of(checkpoint))
    linears, reasons = find_linears(shapes, checkpoint.encoded.keys(), checkpoint.config)
    others = [name.removesuffix(".weight") for name in reasons]
    chosen = recipe.model_copy(update={"ignore": (*(recipe.ignore or ()), *recipe.ignore_also), "ignore_also": ()})
    schemes, ignored = select(chosen, linears, others)
    left = [linear for linear in linears if linear.path in schemes]
    if not left:
        raise UsageError(f"{checkpoint.directory} holds no weight to round in numbered layers")
    quantizer = validated(
        lambda: RoundToNearest(**{k: v for k, v in chosen.quantizer.items() if k != "name"}), "recipe"
    )
    looks = checkpoint.has_weights and not recipe.requantize
    grids = {} if not looks else dict(find_grids(checkpoint, left, schemes))
    found = decisive(grids, {linear.path: linear.rows * linear.columns for linear in left})
    held = {path: grid.size for path, grid in grids.items() if grid.held and not grid.format} if found else {}
    if held:
        chosen = regrouped(chosen, held, schemes, found)
        schemes, _ = select(chosen, linears, others)
    kept = frozenset(path for path, size in held.items() if grid_fits(size, schemes[path].weights))
    if unplaced := dict(unplaced_schemes(schemes.values())):
        raise UsageError(f"{NAME} has no place for {' or '.join(unplaced)}; give {' and '.join(unplaced.values())}")
    needs = "" if held or not found else ", which needs zero points"
    if any(grid.format for grid in grids.values()) and needs:
        needs = f", for which {NAME} has no place"
    what = "kept exactly" if kept else f"rounded anew{', as the groups do not fit' if held else ''}"
    if needs.endswith("points"):
        what += "; a recipe with symmetric = false in [weights] keeps it"
    notes = [*checkpoint.notes, *([f"{found}{needs}: {what}"] if found else [])]
    notes += describe_fallbacks(chosen, schemes, left)
    by_weight = defaultdict[str, list[StoredLinear]](list)
    for linear in left:
        by_weight[linear.weight].append(linear)
    reasons |= {name: why for name, why in ignored.items() if name not in by_weight}
    return ModelFreePlan(checkpoint, chosen, quantizer, by_weight, schemes, shapes, reasons, kept, tuple(notes))


def shapes_of(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor with its shape as floats; of parts of the same shapes one is put together to know it."""
    known = dict[object, tuple[int, ...]]()
    for name in checkpoint.sources:
        if not checkpoint.is_encoded(name):
            yield name, checkpoint.read_shape(name)
            continue
        if not checkpoint.has_weights:
            raise UsageError(
                "a dry run cannot tell the shapes of weights in 8 or 4 bits from afar; leave --low-disk out"
            )
        parts = checkpoint.encoded[name].parts
        told = tuple(checkpoint.read_part(part).flatten().tolist() for role, part in parts.items() if role == "shape")
        key = (str(told), *((role, checkpoint.read_shape(part)) for role, part in parts.items()))
        if key not in known:
            known[key] = tuple(checkpoint.float_tensor(name).shape)
        yield name, known[key]


def find_grids(
    checkpoint: Checkpoint, linears: list[StoredLinear], schemes: Mapping[str, Scheme]
) -> Iterator[tuple[str, Grid]]:
    """Yield the linears whose weights lie on a grid, by some rows of each; a stack's first matrix tells of the others.

    Of weights that are quantized already, or lie on the hub, one of each shape is looked at.
    """
    known, far = dict[object, Grid | None](), checkpoint.remote is not None
    for linear in linears:
        encoded = checkpoint.is_encoded(linear.weight)
        key = (linear.rows, linear.columns, linear.transposed) if encoded or far else linear.weight
        if key not in known:
            args, dtype = schemes[linear.path].weights, checkpoint.dtype_of(linear.weight)
            known[key] = grid_of(some_rows(checkpoint, linear, encoded), args, dtype)
        if (grid := known[key]) is not None:
            yield linear.path, grid


def some_rows(checkpoint: Checkpoint, linear: StoredLinear, encoded: bool) -> Tensor:
    """Return some rows of a linear's weight, evenly spread: few of a matrix in a file, as most lie on no grid."""
    if linear.expert is None and not encoded:
        first = checkpoint.float_rows(linear.weight, FIRST)
        return first if linear.rows <= FIRST else checkpoint.float_rows(linear.weight, ROWS)
    W = checkpoint.float_tensor(linear.weight) if encoded else checkpoint.read_part(linear.weight, 0, 1).float()
    W = W[0] if W.dim() == 3 else W
    W = W.T if linear.transposed else W
    return W[:: max(1, len(W) // ROWS)].contiguous()


@functools.lru_cache
def sample(scheme: Scheme, columns: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes and dtypes of the tensors that a weight of `WORD` rows becomes."""
    weight = RoundToNearest().quantize(torch.zeros(WORD, columns), scheme.weights, None, dtype)
    return {part: (tuple(x.shape), x.dtype) for part, x in stored(weight, is_packed(scheme)).items()}


def file_of(checkpoint: Checkpoint, name: str) -> Path:
    """Return the file that holds a tensor, or the first of its parts."""
    part = next(iter(checkpoint.encoded[name].parts.values())) if name in checkpoint.encoded else name
    return checkpoint.files[part]
