"""After the last block, all other tensors and files are written, verified, and committed with the manifest."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from rich.console import Console

from quantize.artifact.quantization_config import quantization_settings
from quantize.artifact.verify import at_last_token, written_output
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.checkpoint.checkpoint import side_files
from quantize.checkpoint.meta_model import build_skeleton
from quantize.graph.program import Program
from quantize.pipeline.fingerprint import machine, versions
from quantize.pipeline.parity import artifact_parity
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.sequential import SequentialPipeline
from quantize.pipeline.verdict import held_out_record
from quantize.transforms import equivalence


def finish(
    prepared: Prepared,
    writer: ArtifactWriter,
    blocks: SequentialPipeline,
    data: dict[str, Any],
    console: Console | None,
) -> dict[str, Any]:
    """Write what is in no block, verify the files, and commit; return the manifest, which includes `data`."""
    program, checkpoint, plan = prepared.program, prepared.checkpoint, prepared.plan
    writer.add(shard_name(program, len(program.segments) + 1), blocks.unquantized_tensors())
    settings = quantization_settings(plan.recipe, plan.default_scheme, blocks.modules)
    write_side_files(prepared, writer, blocks, settings)
    probes, outputs = blocks.prefixed_probes(), blocks.probes.outputs()
    proof = artifact_parity(program, writer.directory, settings, checkpoint.ties, probes, outputs, console)
    judged, tokens = held_out_record(blocks.held_out, prepared.samples), blocks.rounder.expert_tokens
    return writer.commit(
        {
            "scheme": plan.recipe.scheme,
            "schemes": dict(Counter(scheme.label for scheme in plan.schemes.values())),
            "seed": plan.recipe.seed,
            "versions": versions() | machine(program.device),
            "export": program.export_record() | {"not_compared": not_compared(blocks)},
            "gate": {"tolerance": equivalence.TOLERANCE, "passes": blocks.pass_runner.differences},
            "online": blocks.pass_runner.changed,
            "parity": proof,
            "untied": blocks.ties.untied,
            **{
                name: record
                for name, record in (data | {"held_out": judged, "expert_tokens": tokens}).items()
                if record
            },
            "coverage": coverage(plan, blocks),
            "quantization": settings,
        }
    )


def shard_name(program: Program, number: int) -> str:
    """Return the name of the file of a block, counted from 1; the last number is that of the remaining tensors."""
    return f"model-{number:05}-of-{len(program.segments) + 1:05}.safetensors"


def write_side_files(
    prepared: Prepared, writer: ArtifactWriter, blocks: SequentialPipeline, settings: dict[str, Any]
) -> None:
    """Write config, resolved recipe, tensor index, tokenizer and other files, and the probes with their outputs."""
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
        output = torch.cat([at_last_token(found) for found in blocks.probes.outputs()[::first]]).cpu()
    writer.add_probe({**given, "output": output})


def not_compared(blocks: SequentialPipeline) -> list[str]:
    """Return the quantized linears that ran on no probe, which neither the gate nor the parity check compared."""
    return [path for path in blocks.program.never_executed(blocks.probes.outputs()) if path in blocks.modules]


def coverage(plan: Plan, blocks: SequentialPipeline) -> dict[str, str]:
    """Return for each parameter `quantized`, or the reason why it is not."""
    linears = (linear for segment in blocks.program.segments for linear in blocks.program.linears(segment))
    done = {linear.weight: "quantized" for linear in linears if linear.path in blocks.modules}
    return dict(sorted((plan.skipped | done | dict.fromkeys(plan.tables, "quantized")).items()))


def calibration_record(prepared: Prepared) -> dict[str, Any]:
    """Return the hash and the size of the calibration data, and the ids that all rows begin with, for the manifest."""
    size = prepared.samples.size_record() if prepared.plan.calibrates else {"rows": 0, "tokens": 0}
    return {"sha256": prepared.samples.sha256} | size
