"""Behind the last block: write what belongs to no block, verify what was written, and commit with the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from quantize.artifact.quantization_config import quantization_settings
from quantize.artifact.verify import at_last_token, written_output
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.checkpoint.checkpoint import side_files
from quantize.checkpoint.meta_model import build_skeleton
from quantize.graph.program import Program
from quantize.pipeline.fingerprint import versions
from quantize.pipeline.parity import artifact_parity
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.sequential import SequentialPipeline
from quantize.transforms import equivalence


def finish(
    prepared: Prepared,
    writer: ArtifactWriter,
    blocks: SequentialPipeline,
    data: Mapping[str, Any],
    console: Console | None,
) -> dict[str, Any]:
    """Add all that is no block, verify what was written, and commit; returns the manifest, with what is in `data`."""
    program, checkpoint, plan = prepared.program, prepared.checkpoint, prepared.plan
    writer.add(shard_name(program, len(program.segments) + 1), blocks.unquantized_tensors())
    settings = quantization_settings(plan.recipe, plan.default_scheme, blocks.modules)
    write_side_files(prepared, writer, blocks, settings)
    probes, outputs = blocks.prefixed_probes(), blocks.probes.outputs()
    proof = artifact_parity(program, writer.directory, settings, checkpoint.ties, probes, outputs, console)
    return writer.commit(
        {
            "scheme": plan.recipe.scheme,
            "schemes": dict(Counter(scheme.label for scheme in plan.schemes.values())),
            "seed": plan.recipe.seed,
            "versions": versions(),
            "export": program.export_record() | {"not_compared": not_compared(blocks)},
            "gate": {"tolerance": equivalence.TOLERANCE, "passes": blocks.pass_runner.differences},
            "online": blocks.pass_runner.changed,
            "parity": proof,
            "untied": blocks.ties.untied,
            **{name: record for name, record in data.items() if record},
            "coverage": coverage(plan, blocks),
            "quantization": settings,
        }
    )


def shard_name(program: Program, number: int) -> str:
    """Of the file of a block, counted from 1, or of all that is left."""
    return f"model-{number:05}-of-{len(program.segments) + 1:05}.safetensors"


def write_side_files(
    prepared: Prepared, writer: ArtifactWriter, blocks: SequentialPipeline, settings: dict[str, Any]
) -> None:
    """Config, resolved recipe, tensor index, tokenizer and other side files, and the probes with their outputs."""
    checkpoint = prepared.checkpoint
    if checkpoint.config:
        untied = {"tie_word_embeddings": False} if blocks.ties.untied else {}
        writer.write("config.json", as_json({**checkpoint.config, **untied, "quantization_config": settings}))
    writer.write("recipe.toml", prepared.plan.recipe.to_toml())
    writer.write_index()
    if checkpoint.directory is not None:
        for path in side_files(checkpoint.directory):
            writer.write(path, (checkpoint.directory / path).read_bytes())
    given = {
        name: torch.cat([probe[name] for probe in blocks.verification_inputs]) for name in blocks.verification_inputs[0]
    }
    if prepared.program.export_error:
        fresh = build_skeleton(checkpoint.config) if checkpoint.config else checkpoint.skeleton()
        output = written_output(fresh, writer.directory, settings, given)
    else:
        first = len(prepared.program.output.all_input_nodes)
        output = torch.cat([at_last_token(found) for found in blocks.probes.outputs()[::first]])
    writer.add_probe({**given, "output": output})


def not_compared(blocks: SequentialPipeline) -> list[str]:
    """Quantized linears that ran on no probe, so that neither gate nor parity saw them."""
    return [path for path in blocks.program.never_executed(blocks.probes.outputs()) if path in blocks.modules]


def coverage(plan: Plan, blocks: SequentialPipeline) -> dict[str, str]:
    """Every parameter: quantized, or the reason why not."""
    linears = (linear for segment in blocks.program.segments for linear in blocks.program.linears(segment))
    done = {linear.weight: "quantized" for linear in linears if linear.path in blocks.modules}
    return dict(sorted((plan.skipped | done).items()))


def calibration_record(prepared: Prepared) -> dict[str, Any]:
    """Which data was used, and how much of it."""
    samples = prepared.samples
    rows, tokens = (len(samples.rows), samples.tokens) if prepared.plan.calibrates else (0, 0)
    return {"sha256": samples.sha256, "rows": rows, "tokens": tokens}
