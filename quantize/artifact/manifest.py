"""The manifest describes an artifact and is checked before any of it is used."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from quantize.formats import check_scheme
from quantize.scheme.scheme import Data, KVCacheArgs, Scheme


class Entry(Data):
    """One quantized linear, or a stack of experts in the place of a parameter.

    Attributes:
        columns: the number of columns of its weight.
        experts: the number of experts, which have equally many of the weight's rows; None for a linear alone.
        transposed: whether the parameter of the experts is [experts, K, N], otherwise [experts, N, K].
        online: the online transforms in front of it, in order, each as its `kind` and settings.
        scheme: its scheme, if that is not the one named for all.
    """

    columns: int = Field(ge=1)
    online: tuple[dict[str, Any], ...] = ()
    scheme: Scheme | None = None
    experts: int | None = Field(None, ge=1)
    transposed: bool = False


class QuantizationSettings(Data):
    """The `quantization_config` of an artifact; see `Recipe` for the attributes they share.

    Attributes:
        modules: path → the quantized linear there.
        tables: the modules whose table of words is held in 8 bits.
        prefix: the token ids of the prefix.
    """

    quant_method: str
    scheme: Scheme
    modules: dict[str, Entry]
    tables: tuple[str, ...] = ()
    prefix: tuple[Annotated[int, Field(ge=0)], ...] = ()
    kv_cache: KVCacheArgs | None = None

    @model_validator(mode="after")
    def formats_fit(self) -> Self:
        """Each linear's weights and activations have a product."""
        check_scheme(self.scheme)
        for entry in self.modules.values():
            check_scheme(entry.scheme or self.scheme)
        return self


class Manifest(BaseModel):
    """The part of `manifest.json` that is read again.

    Attributes:
        files: relative path → SHA-256.
        parity: how far what was read back differs from what was quantized.
    """

    files: dict[str, str]
    quantization: QuantizationSettings
    parity: dict[str, Any]
