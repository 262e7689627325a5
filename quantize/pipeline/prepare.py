"""A run is prepared before it changes anything: the model is opened, the plan is made, and the data is read."""

from __future__ import annotations

import functools
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantize.calibration.arguments import longest, look_into, match_inputs, processed, whole_samples
from quantize.calibration.data import Samples
from quantize.calibration.masking import mask_samples
from quantize.calibration.sources import Calibration, read_source
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.checkpoint.tokenizer import load_tokenize, tokenize_with
from quantize.checkpoint.weight_checks import check_weights
from quantize.errors import UsageError
from quantize.graph.fallback.program import make_program
from quantize.graph.program import Program
from quantize.graph.random_numbers import drawing
from quantize.pipeline.bit_options import check_average_bits
from quantize.pipeline.fingerprint import Fingerprint, identity
from quantize.pipeline.grids import plan_with_grids
from quantize.pipeline.held_out import HeldOutRows, hold_out
from quantize.pipeline.kv_cache_check import attention_count, check_kv_cache
from quantize.pipeline.layer_schemes import describe_fallbacks
from quantize.pipeline.plan import Plan
from quantize.pipeline.prefix_check import check_prefix
from quantize.pipeline.tables import module_of
from quantize.recipe.fit import check_length
from quantize.recipe.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A prepared run, which has changed nothing yet: the model, the plan and the data.

    Attributes:
        samples: the rows to calibrate on.
        held_out: rows that were held back from them, to judge the result by.
        seconds: the time it took to prepare the run, most of which is the export of the graph.
        tokenizer: the tokenizer of a module in memory, which the artifact takes along.
        pruning: what the manifest says of experts that were dropped; {} if none were.
    """

    checkpoint: Checkpoint
    program: Program
    plan: Plan
    samples: Samples
    seconds: float
    held_out: HeldOutRows = field(default_factory=HeldOutRows)
    tokenizer: Any = None
    pruning: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    model: str | Path | RemoteShards | nn.Module,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    read: bool = True,
    judge: bool = True,
    tokenizer: Any = None,
    text_column: str | None = None,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Decide and check all that can be decided and checked before the first block.

    Without `read` no weight is read, so wrong weights are not found, and a directory may hold a config alone. With
    `judge` some rows are held back. A tokenizer of transformers takes the place of the one in the model's directory;
    `text_column` is that of `read_source`. A LoRA adapter is merged into the weights. With `trust_remote_code` code of
    the model's own may run.
    """
    start, checkpoint = time.perf_counter(), open_checkpoint(model, adapter, trust_remote_code, weights=read)
    skeleton = checkpoint.skeleton()
    if read:
        check_weights(checkpoint, {name: p.shape for name, p in skeleton.named_parameters()})
    check_length(checkpoint.config, recipe)
    if given := processed(skeleton, calibration, checkpoint.directory, recipe.nsamples, text_column):
        text_column = None
    else:
        given = look_into(calibration)
    inputs, rows = match_inputs(skeleton, given, recipe.nsamples)
    program = make_program(checkpoint, skeleton, None if rows else min(recipe.seqlen, longest(given)), inputs)
    if drawn := drawing(program):
        raise UsageError(
            f"the model draws random numbers as it runs ({drawn}), so no two passes agree and no result can be "
            "checked; give the part of it that draws none"
        )
    plan = plan_with_grids(recipe, program, checkpoint)
    check_average_bits(plan, program, checkpoint)
    check_prefix(plan, program, checkpoint, skeleton)
    if recipe.kv_cache is not None:
        check_kv_cache(program, skeleton)
    masked = functools.partial(masked_as_asked, recipe, program.vocabulary)
    tokenize = load_tokenize(checkpoint.directory) if tokenizer is None else tokenize_with(tokenizer)
    vocabulary = program.vocabulary
    if rows is None:
        data = given.data
        if checkpoint.is_config_alone and data is None and tokenize is None:
            data = torch.arange(recipe.nsamples * recipe.seqlen).remainder(vocabulary).view(-1, recipe.seqlen)
        stamped = (given.first, given.sha256) if given.first is not None and given.sha256 else None
        samples = read_source(data, inputs, recipe.seqlen, recipe.nsamples, tokenize, vocabulary, text_column, stamped)
    else:
        samples = whole_samples(rows, given, program.bounds)
    samples = masked(samples)
    held_out = HeldOutRows()
    if judge and (plan.calibrates or plan.alternative is not None) and not program.export_error:
        generates = next(iter(program.inputs)) == "input_ids" and getattr(skeleton, "can_generate", lambda: False)()
        generates = generates and "decoder_input_ids" not in program.inputs and recipe.calibration is None
        prose = functools.partial(read_source, None, inputs, recipe.seqlen, sys.maxsize, tokenize, vocabulary)
        reads = tokenize and len(inputs) == 1 and not samples.whole
        samples, held_out = hold_out(samples, generates, (lambda: masked(prose())) if reads else None)
    return Prepared(checkpoint, program, plan, samples, time.perf_counter() - start, held_out, tokenizer)


def masked_as_asked(recipe: Recipe, vocabulary: int, samples: Samples) -> Samples:
    """Return samples as they are, or masked if the recipe asks for it."""
    if recipe.calibration is None:
        return samples
    return mask_samples(samples, recipe.calibration.mask_id, vocabulary, recipe.seed)


def identity_of(prepared: Prepared) -> Fingerprint:
    """Return the fingerprint of what the artifact of a run depends on."""
    graph = str(prepared.program.module.graph)
    return identity(prepared.checkpoint, graph, prepared.plan.recipe, prepared.samples, prepared.program.device)


def describe_run(prepared: Prepared) -> str:
    """Return what a run would do, in lines."""
    plan, program = prepared.plan, prepared.program
    counts = Counter(scheme.label for scheme in plan.schemes.values())
    first, *others = counts.items()
    what = ", ".join([f"{first[1]} linears to {first[0]}", *(f"{count} to {label}" for label, count in others)])
    lines = [f"{what}, in {len(program.segments)} blocks, rounded by {plan.quantizer.name}"]
    lines += [program.export_error_message] if program.export_error else []
    lines += [plan.note] if plan.note else []
    if plan.recipe.average_bits is not None:
        lines.append(f"which linears take other bits is measured first, within {plan.recipe.average_bits:g} a weight")
    lines += describe_fallbacks(plan.recipe, plan.schemes, program.all_linears)
    lines += [f"tables of words in 8 bits: {', '.join(map(module_of, plan.tables))}"] if plan.tables else []
    if cache := plan.recipe.kv_cache:
        keys, values = cache.bits
        bits = f"{keys} bits" if keys == values else f"keys of {keys} and values of {values} bits"
        lines.append(f"kv_cache: {bits} at {attention_count(program)} attentions")
    for step in plan.steps:
        lines.append(f"pass {step.handler.name}: {len(step.sites)} bases offline, {len(step.online)} linears online")
    chosen = {linear.weight for linear in program.all_linears} | program.not_replaceable.keys()
    lines += [f"not quantized: {name} ({why})" for name, why in plan.skipped.items() if name in chosen]
    lines += [f"{plan.body.share:.1%} of the body's parameters are quantized", *plan.body.lines()]
    lines.append(f"calibration: {len(prepared.samples.rows)} rows, {prepared.samples.size()}")
    return "\n".join([*lines, "", plan.recipe.to_toml()])
