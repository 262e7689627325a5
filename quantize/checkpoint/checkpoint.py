"""A model's weights, config and side files come from a directory, from the hub, or from a module in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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
from quantize.checkpoint.tensor_files import index_tensors, read_float, read_tensor, require_finite
from quantize.checkpoint.untrusted_files import SIDE_FILES, check_files, is_hidden, read_json
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
    """

    directory: Path | None
    config: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    module: nn.Module | None = None
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, StoredTensor] = field(default_factory=dict)
    seen: FilesSeen = field(default_factory=FilesSeen)

    def skeleton(self) -> nn.Module:
        """Build the model in float32 with parameters on the meta device, tied parameters shared, and real buffers."""
        if self.module is None:
            model = build_skeleton(self.config, self.files)
            buffers = [name for name in model.state_dict() if name not in self.ties and name in self.sources]
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
        if self.module is not None:
            return self.module.get_parameter(name).detach()
        stored = next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)
        if stored is None:
            raise QuantizeError(f"{self.directory} holds no tensor {name}, which the model needs")
        try:
            return self.sources[stored].read(stored, lambda part: read_tensor(self._file(part), part))
        except RuntimeError as error:  # the parts do not fit together
            raise QuantizeError(f"{name} cannot be put together from {self.directory} ({reason(error)})") from None

    def float_tensor(self, name: str) -> Tensor:
        """Read one parameter in float32 and give the file's pages back on the way; it raises what `tensor` raises."""
        stored = next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)
        if self.module is not None or stored is None:
            return self.tensor(name).float()
        return self.sources[stored].read(stored, lambda part: read_float(self._file(part), part)).float()

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
    def hub_id(self) -> str | None:
        """The id that the model has on the hub, if it lies in the hub's cache."""
        parents = self.directory.absolute().parents if self.directory else ()
        cached = len(parents) > 1 and parents[0].name == "snapshots" and parents[1].name.startswith("models--")
        return parents[1].name.removeprefix("models--").replace("--", "/") if cached else None

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


def open_checkpoint(model: str | Path | nn.Module) -> Checkpoint:
    """Find a model's parts without reading a weight.

    Args:
        model: a directory, which never touches a network; a hub id; or a module.

    Raises:
        UsageError: there is no such model, or it cannot be quantized.
        QuantizeError: the model's files are damaged.
    """
    if isinstance(model, nn.Module):
        return Checkpoint(None, config_of(model), module=model, ties=ties_of(model))
    directory = find_directory(model) or download(str(model))
    require_config(directory)
    check_files(directory)
    files = index_tensors(directory)
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


def check_weights(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size]) -> None:
    """Check that every parameter in `shapes` is there, has its shape, and is of finite floating-point numbers.

    Raises:
        QuantizeError: a parameter is not; the message names the first one.
    """
    for name, shape in shapes.items():
        tensor = checkpoint.tensor(name)
        if tensor.shape != shape:
            raise QuantizeError(f"{name} has the shape {list(tensor.shape)}; the config asks for {list(shape)}")
        if not tensor.is_floating_point():
            raise QuantizeError(f"{name} is of {tensor.dtype}; only floating-point weights can be quantized")
        require_finite(name, tensor)
