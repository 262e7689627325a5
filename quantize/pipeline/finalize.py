"""After the last block, all other tensors and files are written, verified, and committed with the manifest."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantize.artifact.load import checked_on_meta, load
from quantize.artifact.quantization_config import quantization_settings
from quantize.artifact.report.card import card
from quantize.artifact.report.page import PAGE, page
from quantize.artifact.verify import LOAD_TOLERANCE, at_last_token, read_probe, run_probe, written_output
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.meta_model import build_skeleton, ties_of
from quantize.checkpoint.tensor_files import read_tensor
from quantize.errors import QuantizeError
from quantize.graph.alike_bases import alike_bases
from quantize.graph.analysis import admissible_bases
from quantize.graph.inputs import listed
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
    shard: str,
    data: dict[str, Any],
    console: Console | None,
) -> dict[str, Any]:
    """Write what is in no block into `shard`, verify the files, and commit; return the manifest, with `data` in it."""
    program, checkpoint, plan = prepared.program, prepared.checkpoint, prepared.plan
    rest = blocks.unquantized_tensors()
    writer.add(shard, rest | no_longer_tied(prepared, writer, blocks, rest))
    settings = quantization_settings(plan.recipe, plan.default_scheme, blocks.modules)
    write_side_files(prepared, writer, blocks, settings)
    probes, outputs = blocks.prefixed_probes(), blocks.probes.outputs()
    proof = artifact_parity(program, writer.directory, settings, checkpoint.ties, probes, outputs, console)
    kept = {x.weight for x in program.all_linears if x.path in blocks.rounder.kept}
    found = {
        "pruning": dict(prepared.pruning),
        "held_out": held_out_record(blocks.held_out, prepared.samples, bool(plan.reader_schemes.keys() - kept)),
        "expert_tokens": blocks.rounder.expert_tokens,
        "rounded_without_data": blocks.held_out.rounded_without_data,
        "grids": plan.note,
        "kept_grids": blocks.rounder.kept,
        "micro_batch": {"rows": blocks.rows, "halved_before": blocks.halved} if blocks.rows else {},
        "begun_on": blocks.context.journal.begun_on if blocks.context.journal else [],
    }
    manifest = {
        "model": {"architecture": architecture(checkpoint), "base_model": checkpoint.hub_id},
        "scheme": plan.recipe.scheme,
        "schemes": dict(Counter(scheme.label for scheme in plan.schemes.values())),
        "seed": plan.recipe.seed,
        "versions": versions() | machine(program.device),
        "export": program.export_record() | {"not_compared": not_compared(blocks)},
        "gate": {"tolerance": equivalence.TOLERANCE, "passes": blocks.pass_runner.differences},
        "online": blocks.pass_runner.changed,
        "rotations_left_out": plan.left_out.record(),
        "parity": proof,
        "untied": blocks.ties.untied,
        "float_bytes": checkpoint.stored_bytes(),
        "bytes": sum(path.stat().st_size for path in writer.directory.glob("model-*.safetensors")),
        **({"remote_code": code_hashes(checkpoint)} if checkpoint.code else {}),
        **{name: record for name, record in (data | found).items() if record},
        "coverage": coverage(plan, blocks),
        "body": plan.body.record(),
        "quantization": settings,
        "report": run_record(prepared, blocks),
    }
    write_report(prepared, writer, manifest)
    checkpoint.seen.require_all_same()
    if checkpoint.adapter is not None:
        checkpoint.adapter.seen.require_all_same()
    return writer.commit(manifest, functools.partial(check_loads, prepared))


def run_record(prepared: Prepared, blocks: SequentialPipeline) -> dict[str, Any]:
    """Return what the page shows beside the rest of the manifest (`RunRecord`)."""
    passes = [
        {"name": step.handler.name, "bases": len(step.sites), "linears": len(step.online)}
        for step in prepared.plan.steps
    ]
    bases = [basis.as_dict() for basis in admissible_bases(prepared.program)]
    return {**vars(blocks.held_out.figures), "passes": passes, "bases": alike_bases(bases)}


def write_report(prepared: Prepared, writer: ArtifactWriter, manifest: dict[str, Any]) -> None:
    """Write the page that shows what was done, and the model card."""
    recipe, known = prepared.plan.recipe.to_toml(), bool(prepared.checkpoint.config)
    generates = manifest["model"]["architecture"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    writer.write(PAGE, page(manifest, recipe))
    writer.write("README.md", card(manifest, recipe, known, known and generates))


def architecture(checkpoint: Checkpoint) -> str:
    """Return the name of the model's class."""
    return str(checkpoint.config["architectures"][0]) if checkpoint.config else type(checkpoint.module).__name__


def code_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the SHA-256 of each file of code of the model's own, by its name."""
    return {path.name: checkpoint.seen.sha256(path) for path in checkpoint.side_files if path.suffix == ".py"}


def artifact_config(prepared: Prepared, blocks: SequentialPipeline) -> dict[str, Any]:
    """Return the model's config as the artifact has it, without the quantization settings."""
    return {**prepared.checkpoint.config, **({"tie_word_embeddings": False} if blocks.ties.untied else {})}


def no_longer_tied(
    prepared: Prepared, writer: ArtifactWriter, blocks: SequentialPipeline, rest: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the parameters that equal a stored one, but that the artifact's config does not tie to it any more.

    `rest` are the tensors that are about to be written.
    """
    if not blocks.ties.untied or not prepared.checkpoint.config:
        return {}
    model = build_skeleton(artifact_config(prepared, blocks), code=prepared.checkpoint.code)
    ties, found = ties_of(model), dict[str, Tensor]()
    for name, stored in blocks.ties.left_out.items():
        if stored not in ties[name]:
            written = (
                rest[stored] if stored in rest else read_tensor(writer.directory / writer.weight_map[stored], stored)
            )
            found[name] = written.clone()
    return found


def check_loads(prepared: Prepared, directory: Path) -> None:
    """Check that the whole directory can be loaded as its user will, in the dtype of its largest tensor.

    Raises:
        QuantizeError: it cannot.
    """
    checkpoint, sizes = prepared.checkpoint, prepared.program.parameters
    largest = max(sizes, key=lambda node: node.meta["val"].numel())
    trusted = checkpoint.code is not None
    skeleton = None if checkpoint.config else checkpoint.skeleton()
    try:
        dtype = checkpoint.dtype_of(sizes[largest])
        load(directory, dtype, skeleton, read=checked_on_meta, trust_remote_code=trusted)
    except QuantizeError as error:
        raise QuantizeError(f"what was written cannot be loaded ({error}); report this") from error
    if prepared.samples.whole:
        skeleton = None if checkpoint.config else checkpoint.skeleton()
        check_computes(load(directory, skeleton=skeleton, engine="reference", trust_remote_code=trusted), directory)


def check_computes(model: nn.Module, directory: Path) -> None:
    """Check that a loaded model gives the outputs that its graph gave on samples with several arguments.

    What `forward` does without one of its arguments may be another thing while it is exported.

    Raises:
        QuantizeError: it gives others.
    """
    given, recorded = read_probe(directory)
    found = equivalence.relative(run_probe(model, given), recorded)
    if found > LOAD_TOLERANCE:
        raise QuantizeError(
            f"on {listed([*given])} the model computes something else than its exported graph (by {found:.1e}); give "
            "every argument that its processor returns"
        )


def write_side_files(
    prepared: Prepared, writer: ArtifactWriter, blocks: SequentialPipeline, settings: dict[str, Any]
) -> None:
    """Write config, resolved recipe, tensor index, tokenizer and other files, and the probes with their outputs."""
    checkpoint = prepared.checkpoint
    if checkpoint.config:
        config = artifact_config(prepared, blocks) | {"quantization_config": settings}
        writer.write("config.json", as_json(config))
    writer.write("recipe.toml", prepared.plan.recipe.to_toml())
    writer.write_index()
    for path in checkpoint.side_files:
        writer.write(path.relative_to(checkpoint.directory or path), checkpoint.seen.read(path))
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(writer.directory)
    given = {
        name: torch.cat([probe[name] for probe in blocks.verification_inputs]) for name in blocks.verification_inputs[0]
    }
    if prepared.program.export_error:
        config, files = checkpoint.config, checkpoint.files
        fresh = build_skeleton(config, files, checkpoint.code) if config else checkpoint.skeleton()
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
