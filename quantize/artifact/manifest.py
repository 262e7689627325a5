"""The manifest describes an artifact and is checked before any of it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, model_validator

from quantize.formats import check_scheme
from quantize.scheme.scheme import Data, KVCacheArgs, Scheme

Count = Annotated[int, Field(ge=0, lt=1 << 63)]  # of bytes, rows and the like


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


class Gate(BaseModel):
    """What the gate found: the largest difference of each pass in each block."""

    passes: dict[str, dict[str, float]] = Field(default_factory=dict)


class Calibration(BaseModel):
    """The data: its hash, or those of its parts, and the numbers of rows and tokens."""

    sha256: str | list[str]
    rows: Count
    tokens: Count


class Manifest(BaseModel):
    """The part of `manifest.json` that is read again.

    Attributes:
        files: relative path → SHA-256.
        parity: how far what was read back differs from what was quantized.
        digest: `digest_of` the manifest, and so of all files; `verify` asks for it.
        coverage: parameter → `quantized`, or the reason why it is not.
        versions: package → version.
    """

    files: dict[str, str]
    quantization: QuantizationSettings
    parity: dict[str, float | str | None]
    digest: str = ""
    coverage: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    gate: Gate = Field(default_factory=Gate)
    calibration: Calibration | None = None


REQUIRED = {"files", "quantization", "parity"}


def digest_of(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a manifest's content without its own entry `digest`.

    The content is canonical JSON: keys sorted, no white space, ASCII alone. It names all other files with their hashes,
    so that one digest stands for the whole directory.
    """
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
