"""A model's weights, config and side files come from a directory, from the hub, or from a module in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.checkpoint.files_seen import FilesSeen
from quantize.checkpoint.key_mapping import StoredTensor, map_keys
from quantize.checkpoint.meta_model import assign_and_tie, build_on_meta, build_skeleton, load_tensors, ties_of
from quantize.checkpoint.paths import find_directory, require_config
from quantize.checkpoint.safetensors_reader import read_rows
from quantize.checkpoint.tensor_files import (
    header_tensor,
    index_tensors,
    read_float,
    require_finite,
)
from quantize.checkpoint.untrusted_files import SIDE_FILES, check_files, has_config_alone, is_hidden, read_json
from quantize.errors import QuantizeError, UsageError, reason

NOT_COPIED = {"config.json", "manifest.json"}


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be built without its weights, and whose weights can be read one by one.

    Attributes:
        directory: where the files are; None for a module in memory.
        config: the config as a dict; empty for a module that has none.
        files: name in a safetensors file → the file.
        sources: tensor name → where it lies in the files.
        module: the module in memory, None for a directory.
        ties: parameter → all names of the same parameter, itself among them.
        seen: the files as they were when the model was opened, which must not change while they are read.
        kept: tensors of which only a part is taken: name → the axis, and the places on it (`with_fewer_experts`).
    """

    directory: Path | None
    config: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    module: nn.Module | None = None
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, StoredTensor] = field(default_factory=dict)
    seen: FilesSeen = field(default_factory=FilesSeen)
    kept: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def bounds(self) -> Mapping[str, Path] | None:
        """The files that bound what may be built from the config; None for a module, whose config is one's own."""
        return self.files if self.module is None else None

    @property
    def is_config_alone(self) -> bool:
        """Whether there are no weights, so that a run can only be estimated."""
        return self.module is None and not self.files

    def skeleton(self) -> nn.Module:
        """Build the model in float32 with parameters on the meta device, tied parameters shared, and real buffers."""
        if self.module is None or self.kept:
            model = build_skeleton(self.config, self.bounds)
            stored = self.sources if self.module is None else self.module.state_dict()
            buffers = [name for name in model.state_dict() if name not in self.ties and name in stored]
            load_tensors(model, {name: self.tensor(name) for name in buffers})
            return model
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in self.module.parameters()
        }
        return copy.deepcopy(self.module, memo).float()

    def tensor(self, name: str) -> Tensor:
        """Read one parameter as it is stored.

        Raises:
            QuantizeError: the parameter is missing or cannot be read.
            ChangedError: its file has changed since the model was opened.
        """
        return self._kept_part(name, self._read(name, self.read_part))

    def float_tensor(self, name: str) -> Tensor:
        """Read one parameter in float32 and give the file's pages back on the way; it raises what `tensor` raises."""
        if self.module is not None or self._stored_name(name) is None:
            return self.tensor(name).float()
        return self._kept_part(name, self._read(name, lambda part: read_float(self._file(part), part))).float()

    def on_meta(self, name: str) -> Tensor:
        """Return a parameter on the meta device, as the headers of the files describe it."""
        if self.module is not None:
            return self.tensor(name).to("meta")
        return self._kept_part(name, self._read(name, lambda part: header_tensor(self._file(part), part)))

    def stored(self, name: str) -> StoredTensor | None:
        """Return where a parameter lies in the files; None if they do not hold it."""
        found = self._stored_name(name)
        return None if found is None else self.sources[found]

    def read_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in the files."""
        return tuple(header_tensor(self._file(part), part).shape)

    def read_part(self, part: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor by its name in the files, or some of its rows."""
        return read_rows(self._file(part), part, first, count)

    def _read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        if self.module is not None:
            held = self.module.get_parameter(name) if name in self.ties else self.module.get_buffer(name)
            return held.detach()
        stored = self._stored_name(name)
        if stored is None:
            raise QuantizeError(f"{self.directory} holds no tensor {name}, which the model needs")
        try:
            return self.sources[stored].read(stored, read)
        except RuntimeError as error:  # the parts do not fit together
            raise QuantizeError(f"{name} cannot be put together from {self.directory} ({reason(error)})") from None

    def _stored_name(self, name: str) -> str | None:
        """Return the name of a parameter, or of one that is tied to it, under which the files hold it."""
        return next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)

    def _kept_part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor."""
        if name not in self.kept:
            return tensor
        axis, places = self.kept[name]
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))

    def _file(self, part: str) -> Path:
        """Return the file that holds a tensor, if it is still what it was."""
        self.seen.require_same(self.files[part])
        return self.files[part]

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Load the whole model in floating point and in evaluation mode."""
        model = self.skeleton()
        read = ((name, require_finite(name, self.tensor(name))) for name, _ in model.named_parameters())
        assign_and_tie(model, {name: tensor.to(dtype) for name, tensor in read})
        return model.eval()

    @property
    def side_files(self) -> list[Path]:
        """The tokenizer's and other small files to take along, as they were when the model was opened."""
        taken = {*self.files.values(), (self.directory or Path()) / "config.json"}
        return [path for path in self.seen.stamps if path not in taken]

    def stored_bytes(self) -> int:
        """Return the bytes of all weights as they are stored, headers of files included."""
        if self.module is None:
            return sum(path.stat().st_size for path in set(self.files.values()))
        return sum(x.nbytes for x in (*self.module.parameters(), *self.module.buffers()))

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers that belong to the model's state."""
        return {name: t for name, t in self.skeleton().state_dict().items() if name not in self.ties}


def side_files(directory: Path) -> list[Path]:
    """List the tokenizer's and other small files to take along, relative to the directory."""
    found = (p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file() and p.suffix in SIDE_FILES)
    return [p for p in found if p.name not in NOT_COPIED and not p.name.endswith(".index.json") and not is_hidden(p)]


def open_checkpoint(model: str | Path | nn.Module, weights: bool = True) -> Checkpoint:
    """Find a model's parts without reading a weight.

    Args:
        model: a directory, which never touches a network; a hub id; or a module.
        weights: whether a directory must have weights; otherwise a config alone is enough.

    Raises:
        UsageError: there is no such model, or it cannot be quantized.
        QuantizeError: the model's files are damaged.
    """
    if isinstance(model, nn.Module):
        return Checkpoint(None, config_of(model), module=model, ties=ties_of(model))
    directory = find_directory(model) or download(str(model))
    require_config(directory)
    check_files(directory)
    files = index_tensors(directory) if weights or not has_config_alone(directory) else {}
    seen = FilesSeen.of(
        {*files.values(), *(directory / path for path in (Path("config.json"), *side_files(directory)))}
    )
    config = read_config(directory)
    if "quantization_config" in config:
        raise UsageError(f"{directory} is quantized already; give the floating-point model")
    model = build_on_meta(config, files)
    return Checkpoint(directory, config, files, None, ties_of(model), map_keys(model, files), seen)


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a transformers model with the name of its class; it is empty for any other module."""
    if not isinstance(model, transformers.PreTrainedModel):
        return {}
    return {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype).split(".")[-1]}


def download(name: str) -> Path:
    """Fetch a model's config, tokenizer and safetensors files from the hub, and nothing else.

    Raises:
        UsageError: the hub has no such model, does not give it to this user, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        patterns = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(SIDE_FILES))]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except GatedRepoError:
        raise UsageError(f"{name} is gated: accept its terms on the hub, and log in with `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UsageError(f"{name} is no directory here, and the hub has no model of that id for you") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        raise UsageError(
            f"{name} is no directory here, and the hub cannot be reached to fetch it; give a model's directory"
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json` as a dict."""
    path = require_config(directory)
    config = read_json(path)
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise UsageError(f"{path} does not name its architecture; add the key architectures")
    if not isinstance(config.get("model_type", ""), str):
        raise UsageError(f"{path} does not name its model_type")
    return config
