"""Experts that add the least to a layer's output are dropped before anything else happens (REAP, arXiv 2510.13999)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.fewer_experts import with_fewer_experts
from quantize.errors import UsageError
from quantize.graph.fallback.program import make_program
from quantize.graph.mixtures import Mixture, find_mixtures
from quantize.pipeline.context import RunContext, running
from quantize.pipeline.plan import make_plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.steps.expert_saliency import Saliency, collect_saliency
from quantize.recipe.recipe import Recipe

GATE = "a model without some of its experts computes another function: the loss on rows held back is measured instead"


@dataclass(frozen=True)
class Pruning:
    """Which experts go: as many in each layer, and in each group of experts from which a router chooses.

    Attributes:
        mixtures: the mixtures of the model, in order.
        ratio: the part of the experts that is to be dropped.
    """

    mixtures: tuple[Mixture, ...]
    ratio: float

    @classmethod
    def of(cls, prepared: Prepared, ratio: float) -> Pruning:
        """Find the mixtures of a prepared run.

        Raises:
            UsageError: there are none, they have different numbers of experts, or no expert would be dropped.
        """
        segments = prepared.program.segments
        found = cls(tuple(mixture for s in segments for mixture in find_mixtures(prepared.program, s)), ratio)
        counts = sorted({mixture.count for mixture in found.mixtures})
        if not counts:
            raise UsageError("recipe: prune drops experts, and no stack of experts is found in the model; leave it out")
        if len(counts) > 1:
            raise UsageError(
                f"recipe: prune drops as many experts in each layer, and layers have {' and '.join(map(str, counts))}; "
                "leave it out"
            )
        if not found.dropped:
            raise UsageError(
                f"recipe: prune: ratio = {ratio} of {counts[0]} experts in {found.groups} groups is less than one in "
                f"each; give at least {found.groups / counts[0]:.3g}"
            )
        return found

    @property
    def count(self) -> int:
        """The number of experts in each layer."""
        return self.mixtures[0].count

    @property
    def groups(self) -> int:
        """The number of groups of experts, from each of which as many are dropped."""
        return max(mixture.groups for mixture in self.mixtures)

    @property
    def dropped(self) -> int:
        """The number of experts that are dropped in each layer."""
        return int(self.ratio * self.count) // self.groups * self.groups

    def kept(self, scores: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Return for each mixture, by its path, the experts of the highest scores [E]; of equal ones the first."""
        return {mixture.path: self._kept(scores[mixture.path]) for mixture in self.mixtures}

    def _kept(self, scores: Tensor) -> list[int]:
        order = scores.view(self.groups, -1).argsort(dim=-1, descending=True, stable=True)
        size = self.count // self.groups
        chosen = order[:, : size - self.dropped // self.groups] + size * torch.arange(self.groups)[:, None]
        return sorted(chosen.flatten().tolist())

    def checkpoint(self, prepared: Prepared, kept: Mapping[str, list[int]]) -> Checkpoint:
        """Return the model with some experts alone.

        Raises:
            UsageError: the config has no number for them.
        """
        stacks = {mixture.stacks[-1].weight: kept[mixture.path] for mixture in self.mixtures}
        return with_fewer_experts(prepared.checkpoint, self.count, stacks)

    def apply(self, prepared: Prepared, recipe: Recipe, kept: Mapping[str, list[int]]) -> Prepared:
        """Return the run of the model with some experts alone.

        Raises:
            UsageError: the experts that stay are too few for the router, or the config has no number for them.
        """
        checkpoint = self.checkpoint(prepared, kept)
        program = make_program(checkpoint, checkpoint.skeleton(), recipe.seqlen)
        if program.export_error:
            raise UsageError(
                f"recipe: prune leaves {self.count - self.dropped} of {self.count} experts, with which the model does "
                f"not run ({program.export_error}); give a smaller ratio"
            )
        program = program.to(prepared.program.device)
        return replace(prepared, checkpoint=checkpoint, program=program, plan=make_plan(recipe, program))


def prune_experts(prepared: Prepared, recipe: Recipe, context: RunContext) -> Prepared:
    """Return the run without the experts of the least saliency, with what the manifest says of it.

    Raises:
        UsageError: the recipe's ratio does not fit the model.
        QuantizeError: the model does not run on the calibration data.
    """
    assert recipe.prune is not None
    pruning = Pruning.of(prepared, recipe.prune.ratio)
    with running("the model"):
        measure = lambda: dataclasses.asdict(collect_saliency(prepared, context))  # noqa: E731
        found = Saliency(**context.cached("experts", measure))
        kept = pruning.kept({mixture.path: found.scores(mixture.path) for mixture in pruning.mixtures})
        after = pruning.apply(prepared, recipe, kept)
        loss = context.cached("pruned", lambda: collect_saliency(after, context, rows=False).loss)
    record = pruning_record(pruning, found, kept) | {"held_out_loss": {"before": found.loss, "after": loss}}
    if context.console is not None:
        context.console.print(told(record), soft_wrap=True, markup=False)
    return replace(after, pruning=record)


def as_pruned(prepared: Prepared, recipe: Recipe) -> Prepared:
    """Return the run without as many experts as the recipe drops, whichever they are, which no data has told yet."""
    if recipe.prune is None:
        return prepared
    pruning = Pruning.of(prepared, recipe.prune.ratio)
    size, groups = pruning.count // pruning.groups, pruning.groups
    left = size - pruning.dropped // groups
    kept = [group * size + expert for group in range(groups) for expert in range(left)]
    return pruning.apply(prepared, recipe, {mixture.path: kept for mixture in pruning.mixtures})


def pruning_record(pruning: Pruning, found: Saliency, kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """Return plain data for the manifest."""
    layers = {
        path: {
            "kept": experts,
            "saliency": [round(x, 6) for x in found.scores(path).tolist()],
            "tokens": found.tokens[path],
        }
        for path, experts in kept.items()
    }
    return {"method": "reap", "experts": pruning.count, "dropped": pruning.dropped, "gate": GATE, "layers": layers}


def told(record: Mapping[str, Any]) -> str:
    """Return a line that says what was dropped, and what that costs."""
    losses = record["held_out_loss"].values()
    cost = "" if None in losses else "; the loss on rows held back goes from {:.4f} to {:.4f}".format(*losses)
    return f"dropped {record['dropped']} of {record['experts']} experts in {len(record['layers'])} layers{cost}"


def check_prune(recipe: Recipe, statistics: bool) -> None:
    """Check that a recipe that drops experts has data of its own.

    Raises:
        UsageError: the run takes or makes a file of statistics, which does not tell which experts to drop.
    """
    if recipe.prune is not None and statistics:
        raise UsageError(
            "recipe: prune runs the calibration data, and files of statistics do not say which experts to drop; prune "
            "the float model with `quantize-model prune` first, or leave --stats and --collect-stats out"
        )
