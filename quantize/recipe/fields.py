"""What a recipe may hold, table by table; nothing slow is imported here, so that a wrong key is answered at once."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from quantize.scheme.scheme import ActivationArgs, Data, KVCacheArgs, SchemeName, TuneArgs, WeightArgs


class PrefixArgs(Data):
    """Tokens that run in front of every sequence (PrefixQuant, arXiv 2410.05265), given as ids or searched for.

    Attributes:
        tokens: ids ≥ 0, in order.
        search: whether to take the tokens that carry massive activations on the calibration data.
    """

    tokens: tuple[Annotated[int, Field(ge=0)], ...] = ()
    search: bool = False

    @model_validator(mode="after")
    def one_of_both(self) -> Self:
        """Check that exactly one of the two is given."""
        if bool(self.tokens) == self.search:
            raise ValueError("give either tokens, a list of ids, or search = true")
        return self


class CalibrationArgs(Data):
    """What is done to the rows of calibration data before they run.

    Attributes:
        mask_id: the token that a masked-diffusion language model has in the place of tokens to find. A part of each
            row's tokens, drawn from 0.1 to 0.9, is replaced by it.
    """

    mask_id: int = Field(ge=0)


class PruneArgs(Data):
    """How many experts of a mixture are dropped before anything else happens (REAP, arXiv 2510.13999).

    Attributes:
        ratio: the part of the experts of each layer that is dropped, rounded down to whole experts.
    """

    ratio: float = Field(gt=0, lt=1)


class LayerArgs(Data):
    """A scheme for some linears, in place of the recipe's.

    Attributes:
        match: which linears: a module path, the end of one, or `re:` and a regular expression.
        scheme: the name of another scheme, whose default tables then hold; None keeps the recipe's scheme.
        group_size: the number of columns that share a scale; None keeps the scheme's.
        ignore: whether to leave the linears in floating point.
    """

    match: str
    scheme: SchemeName | None = None
    group_size: int | None = Field(default=None, ge=0)
    ignore: bool = False

    @model_validator(mode="after")
    def says_something(self) -> Self:
        """Check that the entry either changes something or ignores the linears."""
        changes = self.scheme is not None or self.group_size is not None
        if changes == self.ignore:
            raise ValueError("give either ignore = true, or scheme or group_size or both")
        return self


class RecipeFields(Data, title="Recipe"):
    """The keys of a recipe; `Recipe` checks besides what number formats say of them.

    Attributes:
        scheme: the scheme's name, which fixes the bits and the format of `weights` and `activations`.
        weights, activations: how weights and activations are quantized.
        fallback_group_sizes: the group sizes that a linear may take whose columns `weights.group_size` does not divide;
            it takes the first that does, 0 being per-channel. Without one it is refused. A group size that is asked
            for leaves none.
        kv_cache: how keys and values are quantized; None leaves them in floating point.
        targets: linears to quantize: a module path, the end of one, or `re:` and a regular expression.
        ignore: linears to leave in floating point; None leaves the one that scores the vocabulary, if there is one, and
            those that choose experts.
        ignore_also: further linears to leave in floating point.
        layers: linears with schemes of their own; if several entries match a linear, the last one counts.
        average_bits: the most bits that a weight may take on average, scales and zero points included: the run measures
            which linears take 8 bits or other groups; None leaves all as the tables say.
        tables: tables of words, and the linear that scores the vocabulary, to hold in 8 bits: patterns as in `targets`;
            None names all that the artifact would not store as one tensor.
        nsamples, seqlen: the number of calibration windows, and the number of tokens in each.
        seed: the seed of every random choice the run makes.
        calibration: what is done to the rows of calibration data; None for nothing.
        prefix: tokens in front of every sequence, whose activations are not quantized; None for none.
        prune: how many experts of each layer are dropped; None drops none.
        passes: outlier handlers in order, each `{name, parameters…}`.
        quantizer: how weights are rounded, `{name, parameters…}`.
        tune: how the rounding of each block is tuned afterwards; None does not tune.
        requantize: whether weights that lie on a grid of the format already are rounded anew.
        calibrate_all_experts: whether each expert of a mixture is rounded on all tokens, and not only on those that the
            router sends to it.
    """

    scheme: SchemeName
    weights: WeightArgs
    activations: ActivationArgs | None = None
    fallback_group_sizes: tuple[Annotated[int, Field(ge=0)], ...] = ()
    kv_cache: KVCacheArgs | None = None
    targets: tuple[str, ...] = ("re:.*",)
    ignore: tuple[str, ...] | None = None
    ignore_also: tuple[str, ...] = ()
    layers: tuple[LayerArgs, ...] = ()
    average_bits: float | None = Field(None, gt=0)
    tables: tuple[str, ...] | None = None
    nsamples: int = Field(32, ge=1)
    seqlen: int = Field(512, ge=2)
    seed: int = Field(0, ge=0)
    calibration: CalibrationArgs | None = None
    prefix: PrefixArgs | None = None
    prune: PruneArgs | None = None
    passes: tuple[dict[str, Any], ...] = ()
    tune: TuneArgs | None = None
    quantizer: dict[str, Any] = Field(default_factory=lambda: {"name": "rtn"})
    calibrate_all_experts: bool = False
    requantize: bool = False
