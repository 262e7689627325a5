"""The model card is the artifact's README: how to load it, first of all, and what it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from quantize.artifact.report import tables
from quantize.artifact.report.findings import Findings, findings_of
from quantize.recipe.targets import TARGETS

CARD = """\
---
{metadata}---
# {architecture} in {scheme}

**Load it with `import quantize` first.** The weights are integers that transformers alone does not know: without that
import `from_pretrained` logs a line about an unknown quantization and returns a model whose linears are random.

{loading}
{warnings}
## What it is
{figures}
{losses}
`report.html` in this directory shows where the error is and what was done about it; open it in a browser.

## In other runtimes
Each export is checked against this artifact before it is kept, and refuses by name what a runtime cannot execute.

| runtime | how |
|---|---|
{runtimes}

## How it was made
`quantize-model verify DIRECTORY --digest DIGEST`, with the digest that the run printed, says whether these files are
what the run wrote. The licence is that of the model it was made of. The recipe in full:
```toml
{recipe}```
"""
TRANSFORMERS = """\
```python
import quantize  # pip install quantize-model
from transformers import {classes}

model = {auto}.from_pretrained("DIRECTORY")
```
or `model = quantize.load("DIRECTORY")`, which gives the same model in float32.
"""
MODULE = """\
```python
import quantize  # pip install quantize-model

model = quantize.load("DIRECTORY", skeleton=module)  # a module of the same class, whose weights are replaced
```
transformers does not know this class of module.
"""


def card(manifest: Mapping[str, Any], recipe: str, in_transformers: bool, generates: bool) -> str:
    """Return the model card as Markdown.

    Args:
        manifest: the manifest, which need not have its hashes and its digest yet.
        recipe: the content of `recipe.toml`.
        in_transformers: whether transformers knows the model's class, so that `from_pretrained` loads it.
        generates: whether it is a causal language model.
    """
    found = findings_of({"files": {}, **manifest}, "manifest.json")
    auto = "AutoModelForCausalLM" if generates else found.model.architecture
    loading = TRANSFORMERS.format(auto=auto, classes=auto) if in_transformers else MODULE
    return CARD.format(
        metadata=metadata(found, in_transformers, generates),
        architecture=plain(found.model.architecture),
        scheme=plain(found.scheme),
        loading=loading,
        warnings="".join(f"\n> {plain(text)}\n" for text in tables.warnings(found)),
        figures=table([("", ""), *tables.sizes(found)]),
        losses=f"\n{table(tables.losses(found))}\nOn {plain(tables.judged_on(found.held_out))}.\n"
        if found.held_out
        else "",
        runtimes=runtimes(found, generates)
        if in_transformers
        else "| others | none: transformers does not know the module |",
        recipe=recipe,
    )


def metadata(found: Findings, in_transformers: bool, generates: bool) -> str:
    """Return what the hub reads: the library, the tags, and the model that it was made of, if that is on the hub."""
    entries: dict[str, Any] = {"tags": ["quantize-model", "quantized", *(x.lower() for x in sorted(found.schemes))]}
    entries |= {"library_name": "transformers"} if in_transformers else {}
    entries |= {"pipeline_tag": "text-generation"} if generates else {}
    if found.model.base_model:
        entries |= {"base_model": found.model.base_model, "base_model_relation": "quantized"}
    return str(yaml.safe_dump(entries, sort_keys=True))


def runtimes(found: Findings, generates: bool) -> str:
    """Return a row for each runtime: how it takes the artifact, the command that makes its files, or why not."""
    rows = ["| transformers, PyTorch | as above |"]
    rows += ["| vLLM, where this package is installed | `vllm serve DIRECTORY` |"] if generates else []
    for name, target in sorted(TARGETS.items()):
        why = target.refused.get(found.scheme)
        command = f"`quantize-model export DIRECTORY --format {target.format} --output-dir OUT`"
        rows.append(f"| {name} | {f'no: {plain(why)}' if why else command} |")
    return "\n".join(rows)


def table(rows: list[tables.Row]) -> str:
    """Return a Markdown table, whose first row is the header."""
    header, *rest = (f"| {' | '.join(map(plain, row))} |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *rest, ""])


def plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(text.split()))
