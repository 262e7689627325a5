"""What is quantized to how many bits: the field's scheme names and what they stand for."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field


class Data(BaseModel):
    """Frozen data; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WeightArgs(Data):
    """Weights: w ≈ (v - zero_point) · scale, v a value of the format.

    Attributes:
        num_bits: 4, 6 or 8. 6-bit integers are stored in whole bytes, so they save no more memory than 8-bit ones.
        format: a file of `formats/`, whose `check_args` says which of the other settings it allows.
        symmetric: no zero point.
        group_size: input channels that share a scale; 0 means one scale for each output channel.
    """

    num_bits: Literal[4, 6, 8]
    format: str = "int"
    symmetric: bool = True
    group_size: int = Field(default=0, ge=0)


class RuntimeSmoothArgs(Data):
    """Channels divided by their current maximum (`kernels/runtime_smooth.py`).

    Attributes:
        group_size: channels, sorted by maximum, that share a scale.
        normalize_tokens: take maxima of tokens of the same root mean square; False is the paper's rule.
    """

    group_size: int = Field(default=128, ge=1)
    normalize_tokens: bool = True


class ActivationArgs(Data):
    """Input activations, quantized dynamically: integers with one scale for each token, or FP4.

    Attributes:
        num_bits: 4, 6 or 8. 6-bit integers are held in whole bytes.
        format: `int`, or one with fixed groups of channels; that of the weights decides.
        symmetric: no zero point.
        clip_ratio: part of the token's or group's range that the grid spans.
        runtime_smooth: divide channels by their current maximum first; None does not.
    """

    num_bits: Literal[4, 6, 8]
    format: str = "int"
    symmetric: bool = True
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    runtime_smooth: RuntimeSmoothArgs | None = None


class TuneArgs(Data):
    """How the rounding of each block is tuned (`tuning.py`).

    Attributes:
        steps: of Adam, on batches of `TUNE_TOKENS` tokens.
        learning_rate: at the first step, in quantization steps; it falls to zero as a cosine.
    """

    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=0.005, gt=0)


class KVCacheArgs(Data):
    """Integer keys and values: one scale and zero point for each token of each head.

    Attributes:
        num_bits: 4 or 8.
        symmetric: no zero point.
        clip_ratio: part of the head vector's range that the grid spans.
        hadamard: rotate queries and keys within each head first, which leaves their products.
    """

    num_bits: Literal[4, 8]
    symmetric: bool = False
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    hadamard: bool = True


class Scheme(Data):
    """Weights and input activations of a linear; no `activations` leaves them in floating point.

    `formats.check_scheme` says which go together.
    """

    weights: WeightArgs
    activations: ActivationArgs | None = None

    @property
    def label(self) -> str:
        """The field's name for it: `W4A16`, `MXFP4`."""
        bits = f"W{self.weights.num_bits}A{self.activations.num_bits if self.activations else 16}"
        if self.weights.format == "int":
            return bits
        return self.weights.format.upper() if self.activations else f"{bits} {self.weights.format}"


SchemeName = Literal["W8A8", "W4A16", "W4A8", "W4A4", "W6A6", "MXFP4", "NVFP4"]
SCHEME_NAMES: tuple[str, ...] = get_args(SchemeName)
