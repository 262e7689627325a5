"""A target is a runtime: it decides which recipe makes an artifact that the runtime can execute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantize.errors import UsageError

FP4 = "it has no product of FP4 values; give W4A16 or W4A8"
NO_3_BITS = "it has no product of these 3-bit weights; give W4A16"
ROUNDS_ITSELF = "it rounds activations to 8 bits in blocks of 32 by itself, whatever the scheme"


@dataclass(frozen=True)
class Target:
    """What a runtime can execute.

    Attributes:
        format: the value of `export --format` whose files it loads.
        recipes: scheme → the shipped recipe that takes the place of the scheme's default.
        refused: scheme → why the runtime cannot execute it, and what to give in its place.
    """

    format: str
    recipes: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


CHECKPOINTS = {"W4A16": "w4a16-vllm", "W4A8": "w4a8-vllm", "W4A4": "w4a4-vllm", "MXFP4": "mxfp4-folded"}
TARGETS = {
    "onnxruntime": Target("onnx", {}, {"MXFP4": FP4, "NVFP4": FP4}),
    "llama.cpp": Target(
        "gguf",
        {"W8A8": "w8a8-llama-cpp", "W4A16": "w4a16-llama-cpp", "MXFP4": "mxfp4-folded"},
        {
            "W6A6": f"{ROUNDS_ITSELF}; give W8A8",
            "W3A16": NO_3_BITS,
            "W4A8": f"{ROUNDS_ITSELF}; give W4A16",
            "W4A4": f"{ROUNDS_ITSELF}; give W4A16",
        },
    ),
    "transformers": Target("compressed-tensors", CHECKPOINTS | {"W6A6": "w6a6-folded"}),
    "vllm": Target(
        "compressed-tensors",
        CHECKPOINTS,
        {"W6A6": "it has no product of 6-bit activations; give W8A8 or W4A8", "W3A16": NO_3_BITS},
    ),
}


def recipe_for(target: str | None, scheme: str) -> str | None:
    """Return the shipped recipe of a scheme for a target; None if the scheme's default will do.

    Raises:
        UsageError: there is no such target, or it cannot execute the scheme.
    """
    if target is None:
        return None
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r}; known are {', '.join(TARGETS)}")
    if why := TARGETS[target].refused.get(scheme):
        raise UsageError(f"{target} cannot execute {scheme}: {why}")
    return TARGETS[target].recipes.get(scheme)
