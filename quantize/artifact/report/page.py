"""The page is one HTML file without scripts and without anything to fetch; everything in it is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantize.artifact.report import figures, tables
from quantize.artifact.report.findings import findings_of

PAGE = "report.html"


def page(manifest: Mapping[str, Any], recipe: str) -> str:
    """Return the page of an artifact; the same manifest gives the same bytes.

    Args:
        manifest: the manifest, which need not have its hashes and its digest yet.
        recipe: the content of `recipe.toml`.

    Raises:
        UsageError: an entry of the manifest is not what a run writes.
    """
    found = findings_of({"files": {}, **manifest}, "manifest.json")
    shown = found.report
    drawn = {
        "block_errors": figures.block_errors(shown.blocks),
        "linear_errors": figures.linear_errors(shown.linears),
        "kurtosis": figures.kurtosis_by_pass(shown.inputs),
        "massive": figures.massive_activations(shown.blocks),
        "experts": figures.expert_tokens(found.expert_tokens),
    }
    environment = Environment(
        loader=PackageLoader("quantize.artifact.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.jinja")
    return template.render(
        found=found,
        tables=tables,
        figures={name: Markup(svg) for name, svg in drawn.items()},  # matplotlib escapes what it writes
        recipe=recipe,
    )
