"""A scheme says what is quantized to how many bits, under the names that the field uses."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quantize.scheme.names import ENGINES as ENGINES
from quantize.scheme.names import SCHEME_NAMES as SCHEME_NAMES
from quantize.scheme.names import Engine as Engine
from quantize.scheme.names import SchemeName as SchemeName


class Data(BaseModel):
    """Frozen data; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class WeightArgs(Data):
    """Weights w ≈ (v - zero_point) · scale, where v is a value of the format.

    Attributes:
        num_bits: 3, 4, 6 or 8. Integers of 6 bits are stored in whole bytes, so they save no more memory than 8-bit
            ones.
        format: the name of a file of `formats/`; `formats.check_args` says which other settings it allows.
        symmetric: whether there is no zero point.
        group_size: the number of input channels that share a scale; 0 means one scale for each output channel.
        scale_dtype: a dtype that must hold each scale of integers, and each scale times its zero point, without loss;
            None asks for the model's own dtype alone.
    """

    num_bits: Literal[3, 4, 6, 8]
    format: str = "int"
    symmetric: bool = True
    group_size: int = Field(default=0, ge=0)
    scale_dtype: Literal["float16"] | None = None

    @property
    def stored_bits(self) -> int:
        """The bits that a value takes where it is stored."""
        return self.num_bits if self.num_bits <= 4 else 8


class RuntimeSmoothArgs(Data):
    """Channels are divided by their current maximum (`kernels/runtime_smooth.py`).

    Attributes:
        group_size: the number of channels, sorted by maximum, that share a scale.
        normalize_tokens: whether tokens are scaled to the same root mean square before maxima are taken; the paper does
            not.
    """

    group_size: int = Field(default=128, ge=1)
    normalize_tokens: bool = True


class ActivationArgs(Data):
    """Input activations are quantized dynamically: to integers with one scale for each token, or to FP4.

    Attributes:
        num_bits: 4, 6 or 8. Integers of 6 bits are held in whole bytes.
        format: `int`, or a format with fixed groups of channels; the weights' format decides.
        symmetric: whether there is no zero point.
        clip_ratio: the part of the token's or group's range that the grid spans.
        runtime_smooth: how channels are first divided by their current maximum; None leaves them as they are.
    """

    num_bits: Literal[4, 6, 8]
    format: str = "int"
    symmetric: bool = True
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    runtime_smooth: RuntimeSmoothArgs | None = None


class TuneArgs(Data):
    """How the rounding of each block is tuned (`steps/tune.py`).

    Attributes:
        steps: the number of steps of Adam, each on a batch of `TUNE_TOKENS` tokens.
        learning_rate: the learning rate at the first step, in quantization steps; it falls to zero as a cosine.
    """

    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=0.005, gt=0)


class KVCacheArgs(Data):
    """Integer keys and values have one scale and zero point for each token of each head.

    Attributes:
        num_bits: 4 or 8.
        value_bits: the same of values alone; None takes `num_bits` for both. Errors of keys move the scores of a
            token, and so its weight, while those of values are averaged over all tokens.
        symmetric: whether there is no zero point.
        clip_ratio: the part of the head vector's range that the grid spans.
        hadamard: whether queries and keys are first rotated within each head, which does not change their products.
        residual_length: how many tokens, up to the last one that a query sees, it reads in floating point.
    """

    num_bits: Literal[4, 8]
    value_bits: Literal[4, 8] | None = None
    symmetric: bool = False
    clip_ratio: float = Field(default=1.0, gt=0, le=1)
    hadamard: bool = True
    residual_length: int = Field(default=0, ge=0)

    @property
    def bits(self) -> tuple[int, int]:
        """The bits of keys and of values."""
        return self.num_bits, self.value_bits or self.num_bits


class Scheme(Data):
    """The weights and input activations of a linear; if `activations` is None, they stay in floating point.

    `formats.check_scheme` says which weights and activations go together.
    """

    weights: WeightArgs
    activations: ActivationArgs | None = None

    @property
    def label(self) -> str:
        """The name that the field has for the scheme, such as `W4A16` or `MXFP4`."""
        bits = f"W{self.weights.num_bits}A{self.activations.num_bits if self.activations else 16}"
        if self.weights.format == "int":
            return bits
        return self.weights.format.upper() if self.activations else f"{bits} {self.weights.format}"


# Of tables of words and of the linear that scores the vocabulary, which are rounded to nearest, one scale for each row.
TABLE_SCHEME = Scheme(weights=WeightArgs(num_bits=8, scale_dtype="float16"))
