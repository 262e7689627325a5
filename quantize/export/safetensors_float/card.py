"""The model card says what was done to the weights, and what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from quantize.artifact.load import read_manifest
from quantize.checkpoint.files_seen import sha256
from quantize.export.outline import Outline
from quantize.recipe.recipe import Recipe, load_recipe
from quantize.scheme.scheme import TABLE_SCHEME, ActivationArgs, Scheme, WeightArgs

CARD = """\
---
library_name: transformers
tags:
- quantize-model
- dequantized
---
# {architecture}: weights of {scheme} in floating point

quantize-model rounded the weights of this model, and they are stored here as plain {dtypes} values, so that any tool
that loads the float model loads this one. It is as large as the float model and no faster.

{activations}

## What was done
{done}

Parameters: {coverage}.

The recipe in full:
```toml
{recipe}```

## What was measured
{measured}

SHA-256 of the artifact's `manifest.json`: `{sha256}`; {versions}.
"""
WITH_ACTIVATIONS = """\
**Activations are not quantized in this checkpoint; in the artifact that it was made of, they are.** It shows the loss
that comes of the weights alone. On top of that, rounding activations moves the artifact's output by {moved:.1e} of
itself, on its probes."""
WEIGHTS_ALONE = "The artifact that it was made of leaves activations in floating point, too: it computes the same."


def model_card(directory: Path, outline: Outline, dtypes: Iterable[torch.dtype], parity: Mapping[str, float]) -> str:
    """Return the card as Markdown.

    Args:
        directory: the artifact.
        outline: the artifact's outline.
        dtypes: the dtypes in which quantized weights are stored.
        parity: the parity figures of the checkpoint.
    """
    manifest, recipe, schemes = (
        read_manifest(directory),
        load_recipe(None, directory / "recipe.toml"),
        outline.schemes(),
    )
    rounds = any(scheme.activations for scheme in schemes.values())
    return CARD.format(
        architecture=outline.config["architectures"][0],
        scheme=recipe.scheme,
        dtypes=" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        activations=WITH_ACTIVATIONS.format(moved=parity["activations"]) if rounds else WEIGHTS_ALONE,
        done=as_list(done(manifest, recipe, outline)),
        coverage=counted(manifest.get("coverage", {}).values()),
        recipe=recipe.to_toml(),
        measured=as_list(measured(manifest, parity)),
        sha256=sha256(directory / "manifest.json"),
        versions=", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
    )


def done(manifest: Mapping[str, Any], recipe: Recipe, outline: Outline) -> dict[str, str]:
    """Return what was done to the model, as labels and texts."""
    schemes, data = outline.schemes().values(), manifest.get("calibration")
    kinds = [online["kind"] for entry in outline.settings["modules"].values() for online in entry.get("online", ())]
    folded = "; each is multiplied into the weight behind it here, or added to its bias" if kinds else ""
    return {
        "weights": counted(described(scheme.weights) for scheme in schemes),
        "tables of words": counted(described(TABLE_SCHEME.weights) for _ in outline.settings.get("tables", ()))
        or "floating point",
        "activations of the artifact": counted(rounded(scheme) for scheme in schemes),
        "passes": ", ".join(str(entry.get("name")) for entry in recipe.passes) or "none",
        "transforms in front of linears in the artifact": (counted(kinds) or "none") + folded,
        "quantizer": str(recipe.quantizer.get("name")) + (", then tuned block by block" if recipe.tune else ""),
        "calibration": f"{data['rows']} rows, {data['tokens']} tokens, SHA-256 `{data['sha256']}`" if data else "none",
        "seed": str(recipe.seed),
    }


def measured(manifest: Mapping[str, Any], parity: Mapping[str, float]) -> dict[str, str]:
    """Return what the run and the export measured, each relative to the output."""
    gate, own = manifest.get("gate", {}), manifest["parity"]
    passes = {name: max(blocks.values(), default=0.0) for name, blocks in gate.get("passes", {}).items()}
    at_gate = ", ".join(f"{name} {difference:.1e}" for name, difference in passes.items()) or "no pass"
    ran = ", ".join(f"{name} {x if isinstance(x, str) else f'{x:.1e}'}" for name, x in own.items())
    return {
        "float model before and after each pass": at_gate,
        "artifact against what was quantized": ran,
        "this checkpoint against the artifact with activations in floating point": (
            f"{parity['reference']:.1e}, where errors as large as those of the type that weights are stored in, "
            f"at random, make {parity['rounding']:.1e}"
        ),
    }


def described(args: WeightArgs) -> str:
    """Describe the grid of weights."""
    kind = f"{args.num_bits}-bit integers" if args.format == "int" else args.format.upper()
    grid = "symmetric" if args.symmetric else "with zero points"
    return f"{kind}, {grid}, {f'groups of {args.group_size}' if args.group_size else 'one scale for each channel'}"


def rounded(scheme: Scheme) -> str:
    """Describe how activations in front of a linear are rounded."""
    args: ActivationArgs | None = scheme.activations
    if args is None:
        return "floating point"
    return f"{args.num_bits} bits" if args.format == "int" else args.format.upper()


def counted(found: Iterable[str]) -> str:
    """Count equal texts, the most frequent first: `7 × 4 bits; 1 × 8 bits`."""
    return "; ".join(f"{count} × {name}" for name, count in Counter(found).most_common())


def as_list(entries: Mapping[str, str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {name}: {value}" for name, value in entries.items())
