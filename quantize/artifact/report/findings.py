"""What page and model card say is checked when a manifest is read, since a stranger may have written it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from quantize.artifact.manifest import Count, Manifest
from quantize.recipe.validation import validated


class Errors(BaseModel):
    """Relative errors by plain rounding and as quantized, on the rows that were held back."""

    plain_rounding: float
    quantized: float


class BlockRecord(Errors):
    """The errors behind a block, and the largest and the median magnitude there, in the float model and transformed."""

    largest: float
    median: float
    transformed_largest: float
    transformed_median: float


class Stage(BaseModel):
    """The input of a linear in the float model (`float`), or after the pass of some name."""

    stage: str
    kurtosis: float
    largest: float


class InputRecord(BaseModel):
    """The linears that share an input, and its figures after each pass."""

    linears: list[str] = Field(min_length=1)
    stages: list[Stage] = Field(min_length=1)


class BasisKind(BaseModel):
    """Bases alike in every layer, as `alike_bases` returns them."""

    count: Count
    channels: str
    allowed: str
    written_by: list[str]
    read_by: list[str]
    why_no_more: list[str]


class PassRecord(BaseModel):
    """A pass with the number of bases that it transforms, and of linears in front of which it may put something."""

    name: str
    bases: Count
    linears: Count


class RunRecord(BaseModel):
    """What the page alone shows: see `RunFigures` for blocks, linears and inputs."""

    blocks: dict[str, BlockRecord] = Field(default_factory=dict)
    linears: dict[str, Errors] = Field(default_factory=dict)
    inputs: dict[str, InputRecord] = Field(default_factory=dict)
    bases: list[BasisKind] = Field(default_factory=list)
    passes: list[PassRecord] = Field(default_factory=list)


class HeldOut(BaseModel):
    """The verdict of the rows that were held back; `float_model` has a loss if the model predicts the next token."""

    float_model: dict[str, float] = Field(default_factory=dict, alias="float")
    plain_rounding: dict[str, float]
    quantized: dict[str, float]
    source: str
    rows: Count
    tokens: Count
    warning: str = ""
    rounded_plainly: list[str] = Field(default_factory=list)
    not_tuned: list[str] = Field(default_factory=list)


class Left(BaseModel):
    """What stays in floating point for one reason."""

    reason: str
    parameters: Count
    tensors: Count
    largest: str


class BodyRecord(BaseModel):
    """The share of the body that is quantized."""

    parameters: Count
    quantized: Count
    left: list[Left]


class Model(BaseModel):
    """The class of the model, and its id on the hub if it came from there."""

    architecture: str = "model"
    base_model: str | None = None


class Findings(Manifest):
    """A manifest as page and card read it; an older artifact lacks some of it."""

    model: Model = Field(default_factory=Model)
    scheme: str = ""
    schemes: dict[str, Count] = Field(default_factory=dict)
    seed: Count | None = None
    float_bytes: Count = 0
    bytes: Count = 0
    versions: dict[str, Any] = Field(default_factory=dict)
    held_out: HeldOut | None = None
    expert_tokens: dict[str, list[Count]] = Field(default_factory=dict)
    rounded_without_data: list[str] = Field(default_factory=list)
    body: BodyRecord | None = None
    report: RunRecord = Field(default_factory=RunRecord)


def findings_of(manifest: Mapping[str, Any], source: str) -> Findings:
    """Return the findings in a manifest; those that page and card need not know are left out.

    Raises:
        UsageError: an entry is not what a run writes; the message names `source` and the entry.
    """
    return validated(lambda: Findings.model_validate_json(json.dumps(manifest), strict=True), source)
