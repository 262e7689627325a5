"""Which formats an artifact can be exported to, before it is made."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.errors import UsageError
from quantize.export.compressed_tensors.export import obstacles
from quantize.export.onnx.lowering import lower
from quantize.pipeline.estimate.artifact_size import ArtifactEstimate


def formats(found: ArtifactEstimate) -> dict[str, str]:
    """Format → why it cannot express the artifact; empty where it can."""
    if not found.checkpoint.config:
        return dict.fromkeys(("onnx", "compressed-tensors"), "a module that transformers does not know is not exported")
    skeleton, common = found.checkpoint.skeleton(), found.plan.recipe.activations
    missing = dict.fromkeys(obstacles(found.settings, common, skeleton))
    places = (f"no place for {what}: quantize with {remedy}" for what, remedy in missing)
    return {"onnx": "; ".join(onnx_obstacles(found)), "compressed-tensors": "; ".join(places)}


def onnx_obstacles(found: ArtifactEstimate) -> Iterator[str]:
    """What ONNX Runtime cannot run, each reason once."""
    if found.plan.recipe.kv_cache:
        yield "quantized keys and values cannot be exported; leave the table kv_cache out"
    reasons = set()
    for module in found.modules.values():
        try:
            lower(module)
        except UsageError as error:
            reasons.add(str(error))
    yield from sorted(reasons)


def exports(found: ArtifactEstimate) -> Iterator[str]:
    """Whether the graph could be exported, and where the artifact could go."""
    if not found.program.export_error:
        yield "the model can be exported as a graph"
    for name, why in formats(found).items():
        yield f"export to {name}: {f'no, {why}' if why else 'yes'}"
