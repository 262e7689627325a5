"""The outlier handlers that `make bench-handlers` compares are changes of a scheme's default recipe."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from quantize.recipe.recipe import load_recipe

WHOLE = "whole recipe"  # the default recipe, and at W4A4 `w4a4-folded`, whose parts are the handlers here
GPTQ, RTN = {"name": "gptq"}, {"name": "rtn"}
RIDGE = {"name": "gptaq", "alpha": 1.0, "ridge": 1.0}
FOLD, ROTATE = {"name": "fold_norms"}, {"name": "rotate"}
SYMMETRIC = {"symmetric": True}
FINETUNED = "fine-tuned first: input clips, kurtosis penalty"


def recipe(*passes: dict[str, Any], quantizer: dict[str, Any] = GPTQ, **more: Any) -> dict[str, Any]:
    """Return the changes for some passes and a quantizer."""
    return {"passes": list(passes), "quantizer": quantizer, **more}


def named(name: str, **parameters: Any) -> dict[str, Any]:
    """Return one pass."""
    return {"name": name, **parameters}


HANDLERS: dict[str, dict[str, Any]] = {
    "nothing, RTN": recipe(quantizer=RTN),
    "nothing": recipe(),
    "nothing, GPTAQ": recipe(quantizer={"name": "gptaq"}),
    "SmoothQuant α = 0.5": recipe(named("smoothquant")),
    "SmoothQuant, α searched": recipe(named("smoothquant", alpha="search")),
    "AQAS": recipe(named("aqas")),
    "Hadamard, offline": recipe(FOLD, named("rotate", online_hadamard=False)),
    "Hadamard": recipe(FOLD, ROTATE),
    "Hadamard, RTN": recipe(FOLD, ROTATE, quantizer=RTN),
    "Hadamard, GPTAQ": recipe(FOLD, ROTATE, quantizer={"name": "gptaq"}),
    "WUSH": recipe(named("wush")),
    "rescaled, Hadamard, all online": recipe(named("rescale"), named("rotate", residual=False)),
    "rescaled, Hadamard": recipe(named("rescale"), FOLD, ROTATE),
    "Hadamard, GPTAQ with a ridge": recipe(FOLD, ROTATE, quantizer=RIDGE),
    "AQAS, Hadamard": recipe(named("aqas"), FOLD, ROTATE),
    "adaptive rotation": recipe(FOLD, named("adaptive_rotation")),
    "adaptive rotation, J ≥ 1": recipe(FOLD, named("adaptive_rotation", threshold=1.0)),
    "learned rotation, whip": recipe(FOLD, named("learned_rotation")),
    "learned rotation, kurtosis": recipe(FOLD, named("learned_rotation", objective="kurtosis")),
    "runtime smooth, paper's rule": recipe(named("runtime_smooth", normalize_tokens=False)),
    "runtime smooth": recipe(named("runtime_smooth")),
    "rotated runtime smooth, paper's rule": recipe(FOLD, ROTATE, named("runtime_smooth", normalize_tokens=False)),
    "rotated runtime smooth": recipe(FOLD, ROTATE, named("runtime_smooth")),
    "nothing, symmetric inputs": recipe(activations=SYMMETRIC),
    "noisy bias, symmetric inputs": recipe(named("noisy_bias"), activations=SYMMETRIC),
    "noisy bias and shift, symmetric inputs": recipe(named("noisy_bias", mean_shift=True), activations=SYMMETRIC),
    "Hadamard, activation clip": recipe(FOLD, ROTATE, named("activation_clip")),
    "Hadamard, prefix tokens searched": recipe(FOLD, ROTATE, prefix={"search": True}),
    FINETUNED: recipe(),
    "rescaled, Hadamard, GPTAQ with a ridge": recipe(named("rescale"), FOLD, ROTATE, quantizer=RIDGE),
    WHOLE: {},
}
LANGUAGE_ONLY = {"Hadamard, prefix tokens searched", FINETUNED}


def whole(scheme: str) -> dict[str, Any]:
    """Return the changes of a scheme's default recipe that make the recipe whose parts are measured."""
    folded = load_recipe("W4A4", Path("w4a4-folded"))
    return {"passes": list(folded.passes)} if scheme == "W4A4" else {}


@functools.cache
def left_out(scheme: str) -> dict[str, dict[str, Any]]:
    """Return the whole recipe without one of its handlers, for each in turn.

    A better quantizer counts as a handler, and a fold of gains does not. Learned rotations are left out twice: in
    favour of random Hadamard matrices, and of none.
    """
    default = load_recipe(scheme, whole(scheme))
    without: dict[str, dict[str, Any]] = {
        step["name"]: {"passes": [other for other in default.passes if other is not step]}
        for step in default.passes
        if step != FOLD
    }
    if "learned_rotation" in without:
        hadamard = [ROTATE if step["name"] == "learned_rotation" else step for step in default.passes]
        without["learning, with Hadamard"] = {"passes": hadamard}
    if default.quantizer["name"] == "gptaq":
        without["GPTAQ, with GPTQ"] = {"quantizer": GPTQ}
    if default.quantizer.get("ridge"):
        without["the ridge"] = {"quantizer": {**default.quantizer, "ridge": 0.0}}
    return {f"{WHOLE}, without {name}": whole(scheme) | changes for name, changes in without.items()}
