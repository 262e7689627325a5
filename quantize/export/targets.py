"""Before an artifact is made, it is known to which targets it can be exported."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.export import EXPORTERS
from quantize.export.outline import Outline
from quantize.pipeline.estimate.artifact_size import ArtifactEstimate
from quantize.recipe.targets import TARGETS


def formats(found: ArtifactEstimate) -> dict[str, str]:
    """Return for each target why it cannot express the artifact; the text is empty if it can."""
    if not found.checkpoint.config:
        return dict.fromkeys(sorted(EXPORTERS), "a module that transformers does not know is not exported")
    outline = Outline.estimate(found)
    return {name: "; ".join(EXPORTERS[name].refusals(outline)) for name in sorted(EXPORTERS)}


def refusal(runtime: str, found: ArtifactEstimate) -> str:
    """Return why a runtime, a name in `TARGETS`, cannot execute the artifact; the text is empty if it can."""
    name = TARGETS[runtime].format
    return formats(found)[name] or EXPORTERS[name].not_executed(runtime, Outline.estimate(found))


def exports(found: ArtifactEstimate) -> Iterator[str]:
    """Yield lines that say whether the graph could be exported, and to which targets the artifact can go."""
    if not found.program.export_error:
        yield "the model can be exported as a graph"
    for name, why in formats(found).items():
        yield f"export to {name}: {f'no, {why}' if why else 'yes'}"
