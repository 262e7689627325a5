"""What an artifact says of itself, checked before any of it is used."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from quantize.recipe.scheme import Data, KVCacheArgs, Scheme


class Entry(Data):
    """One quantized linear.

    Attributes:
        columns: of its weight.
        online: what runs in front of it, in order: `kind` and settings.
        scheme: where it is not the one named for all.
    """

    columns: int = Field(ge=1)
    online: tuple[dict[str, Any], ...] = ()
    scheme: Scheme | None = None


class QuantizationSettings(Data):
    """The `quantization_config` of an artifact; see `Recipe` for the attributes they share.

    Attributes:
        modules: path → what stands there.
        prefix: token ids.
    """

    quant_method: str
    scheme: Scheme
    modules: dict[str, Entry]
    prefix: tuple[Annotated[int, Field(ge=0)], ...] = ()
    kv_cache: KVCacheArgs | None = None


class Manifest(BaseModel):
    """The part of `manifest.json` that is read again.

    Attributes:
        files: relative path → SHA-256.
        parity: figures of the run.
    """

    files: dict[str, str]
    quantization: QuantizationSettings
    parity: dict[str, Any]
