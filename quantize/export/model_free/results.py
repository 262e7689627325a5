"""What stands beside the rounded weights: the config, the manifest, and what a person should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantize.artifact.load import checked_on_meta, load, without_class
from quantize.artifact.quantization_config import quantization_settings
from quantize.artifact.writer import ArtifactWriter, as_json
from quantize.errors import QuantizeError
from quantize.export.compressed_tensors.experts import expert_targets
from quantize.export.compressed_tensors.format import quantization_config
from quantize.export.model_free.experts import WEIGHT
from quantize.export.model_free.plan import ModelFreePlan
from quantize.pipeline.fingerprint import versions
from quantize.scheme.scheme import Scheme


def finish_checkpoint(plan: ModelFreePlan, writer: ArtifactWriter, kept: list[str]) -> dict[str, Any]:
    """Write what makes a checkpoint of compressed-tensors of the files, and commit; return the manifest."""
    stacks = {x.path for x in plan.of_stacks}
    settings = quantization_config(with_patterns(plan.schemes, stacks), modules_in_float(plan))
    writer.write_index()
    write_beside(plan, writer, {**plan.checkpoint.config, "quantization_config": settings})
    return writer.commit({"format": plan.form.name, **record(plan, writer, kept)})


def finish_artifact(plan: ModelFreePlan, writer: ArtifactWriter, kept: list[str]) -> dict[str, Any]:
    """Write what makes an artifact of the files, load it if its class is known, and commit; return the manifest.

    Raises:
        QuantizeError: what was written cannot be loaded.
    """
    settings = artifact_settings(plan)
    writer.write_index()
    write_beside(plan, writer, {**plan.checkpoint.config, "quantization_config": settings})
    manifest = {**record(plan, writer, kept), "quantization": settings, "parity": {"reloaded": "not compared"}}

    def check(directory: Path) -> None:
        try:
            if not without_class(directory):
                load(directory, plan.checkpoint.dtype, read=checked_on_meta)
        except QuantizeError as error:
            raise QuantizeError(f"what was written cannot be loaded ({error}); report this") from error

    return writer.commit(manifest, check)


def artifact_settings(plan: ModelFreePlan) -> dict[str, Any]:
    """Return the `quantization_config` of an artifact."""
    default, modules = Counter(plan.schemes.values()).most_common(1)[0][0], dict[str, dict[str, object]]()
    for linear in (x for linears in plan.linears.values() for x in linears):
        entry: dict[str, object] = {"columns": linear.columns}
        if linear.experts is not None:
            entry |= {"experts": linear.experts, "transposed": linear.transposed}
        if (scheme := plan.schemes[linear.path]) != default:
            entry["scheme"] = scheme.model_dump()
        modules[linear.path] = entry
    return quantization_settings(plan.recipe, default, modules)


def write_beside(plan: ModelFreePlan, writer: ArtifactWriter, config: Mapping[str, Any]) -> None:
    """Write the config, the recipe and the model's other small files, which must not have changed meanwhile."""
    checkpoint, directory = plan.checkpoint, plan.checkpoint.directory
    assert directory is not None
    writer.write("config.json", as_json(config))
    writer.write("recipe.toml", plan.recipe.to_toml())
    for path in checkpoint.side_files:
        writer.write(path.relative_to(directory), checkpoint.seen.read(path))
    checkpoint.seen.require_all_same()


def record(plan: ModelFreePlan, writer: ArtifactWriter, kept: list[str]) -> dict[str, Any]:
    """Return what the manifest of every form says."""
    weights = [path for kind in ("*.safetensors", "*.gguf") for path in writer.directory.glob(kind)]
    return {
        "model_free": True,
        "scheme": plan.recipe.scheme,
        "schemes": dict(Counter(scheme.label for scheme in plan.schemes.values())),
        "versions": versions(),
        "float_bytes": plan.checkpoint.stored_bytes(),
        "bytes": sum(path.stat().st_size for path in weights),
        "kept_grids": kept,
        "coverage": dict(sorted((dict(plan.reasons) | dict.fromkeys(plan.linears, "quantized")).items())),
    }


def with_patterns(schemes: Mapping[str, Scheme], experts: set[str]) -> dict[str, Scheme]:
    """Return the schemes by path, with one pattern for all experts of a stack."""
    return {
        place: scheme
        for path, scheme in schemes.items()
        for place in (expert_targets([path]) if path in experts else [path])
    }


def modules_in_float(plan: ModelFreePlan) -> list[str]:
    """Return the modules whose weights of two or more axes stay in floating point."""
    names = (name for name, shape in plan.shapes.items() if len(shape) > 1 and name not in plan.linears)
    return [name.removesuffix(WEIGHT) for name in names if name.endswith(WEIGHT)]
