"""A model's weights, config and side files come from a directory, from the hub, or from a module in memory."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.checkpoint.adapter import Adapter
from quantize.checkpoint.files_seen import FilesSeen
from quantize.checkpoint.key_mapping import StoredTensor
from quantize.checkpoint.meta_model import assign_and_tie, build_skeleton, load_tensors
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.checkpoint.safetensors_reader import DTYPES, read_header, read_rows
from quantize.checkpoint.size_limits import NoFiles
from quantize.checkpoint.sources import gguf
from quantize.checkpoint.sources.encoded import Encoded
from quantize.checkpoint.tensor_files import header_tensor, read_float, read_tensor, require_finite
from quantize.errors import QuantizeError, reason

# Classifiers without a padding token refuse more than one row, as they could not tell padding from text. A run's rows
# have no padding, which an id says that no token has.
NO_TOKEN = -1


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be built without its weights, and whose weights can be read one by one.

    Attributes:
        directory: where the files are; None for a module in memory.
        config: the config as a dict, without quantization settings; empty for a module that has none.
        files: name in a safetensors file → the file.
        sources: tensor name → where it lies in the files.
        module: the module in memory, None for a directory.
        ties: parameter → all names of the same parameter, itself among them.
        seen: the files as they were when the model was opened, which must not change while they are read.
        adapter: what is merged into the weights while they are read.
        code: the directory, if code in it may run.
        notes: what is not as the config or the names say, each in a sentence for people.
        encoded: the tensors that are made of parts in the files, by the names that they would have as floats.
        dtype: the dtype of the tensors that are made of parts.
        computed: parameters that no file holds, because the model computes them.
        remote: the hub's files of which few are on disk; None for files that stay here.
        kept: tensors of which only a part is taken: name → the axis, and the places on it (`with_fewer_experts`).
    """

    directory: Path | None
    config: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    module: nn.Module | None = None
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sources: dict[str, StoredTensor] = field(default_factory=dict)
    seen: FilesSeen = field(default_factory=FilesSeen)
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()
    code: Path | None = None
    encoded: dict[str, Encoded] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    computed: dict[str, Tensor] = field(default_factory=dict)
    remote: RemoteShards | None = None
    kept: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def bounds(self) -> Mapping[str, Path] | None:
        """The files that bound what may be built from the config; None for a module, whose config is one's own."""
        return self.files if self.module is None else None

    @property
    def is_config_alone(self) -> bool:
        """Whether there are no weights, so that a run can only be estimated."""
        return isinstance(self.files, NoFiles)

    @property
    def has_weights(self) -> bool:
        """Whether weights may be read; a run without them can only be estimated."""
        return not self.is_config_alone and (self.remote is None or self.remote.fetches)

    def skeleton(self) -> nn.Module:
        """Build the model in float32 with parameters on the meta device, tied parameters shared, and real buffers."""
        if self.module is None or self.kept:
            model = build_skeleton(self.config, self.bounds, self.code)
            stored = self.sources if self.module is None else self.module.state_dict()
            held = [name for name in model.state_dict() if name not in self.ties and name in stored]
            buffers = held if self.module is not None or self.has_weights else []
            load_tensors(model, {name: self.tensor(name) for name in buffers})
            config: Any = model.config
            if getattr(config, "pad_token_id", 0) is None:
                config.pad_token_id = NO_TOKEN
            return model
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in self.module.parameters()
        }
        return copy.deepcopy(self.module, memo).float()

    def tensor(self, name: str) -> Tensor:
        """Read one parameter as it is stored, or in the config's dtype if it is made of parts.

        Raises:
            QuantizeError: the parameter is missing or cannot be read.
            ChangedError: its file has changed since the model was opened.
        """
        if self.module is not None:
            held = self.module.get_parameter(name) if name in self.ties else self.module.get_buffer(name)
            return self._kept_part(name, held.detach())
        found = self._read(name, read_tensor)
        return found.to(self.dtype) if self.is_encoded(name) else found

    def float_tensor(self, name: str) -> Tensor:
        """Read one parameter in float32 and give the file's pages back on the way; it raises what `tensor` raises."""
        if self.module is not None:
            return self.tensor(name).float()
        return self._read(name, read_float).float()

    def compact_tensor(self, name: str) -> Tensor:
        """Read one parameter in the smallest dtype that holds the numbers of `float_tensor`, which it has as stored."""
        source = self.stored(name)
        as_stored = self.module is not None or (source is not None and source.converter is None)
        return self.tensor(name) if as_stored else self.float_tensor(name)

    def on_meta(self, name: str) -> Tensor:
        """Return a parameter on the meta device, as far as may be by the headers of the files."""
        if self.module is not None or self.is_encoded(name) or name in self.computed:
            return self.tensor(name).to("meta")
        return self._kept_part(name, self._put_together(name, header_tensor))

    def stored(self, name: str) -> StoredTensor | None:
        """Return where a parameter lies as it is in files; None if it lies elsewhere, or is made, merged or pruned."""
        return None if self.module is None and self.is_encoded(name) else self.source_of(name)

    def source_of(self, name: str) -> StoredTensor | None:
        """Return what `stored` returns, also of a parameter that is quantized already."""
        apart = self.module is not None or self.adapter is not None
        left_out = name in self.kept or name in self.computed
        return None if apart or left_out else self.sources[self.stored_name(name)]

    def read_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in the files."""
        return tuple(header_tensor(self.files[part], part).shape)

    def float_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is made of parts, from the headers of the files.

        Raises:
            QuantizeError: the parts do not fit together.
        """
        found = self.encoded[name]
        parts = {role: header_tensor(self.files[part], part) for role, part in found.parts.items() if role != "g_idx"}
        if "shape" in parts:  # some numbers, which no header has
            parts["shape"] = self._few_numbers(found.parts["shape"])
        with torch.device("meta"):
            return tuple(found.put_together(name, parts).shape)

    def _few_numbers(self, part: str) -> Tensor:
        """Read a small tensor; if weights may not be fetched, it alone is."""
        path = self.files[part]
        if self.remote is None or self.remote.fetches:
            return self.read_part(part)
        header = read_header(path)
        entry = header.entries[part]
        first, end = entry.data_offsets
        raw = self.remote.read_bytes(path, header.start + first, end - first)
        return torch.frombuffer(bytearray(raw), dtype=DTYPES[entry.dtype]).view(entry.shape)

    def read_as_float(self, part: str) -> Tensor:
        """Read a tensor by the name that it has in the files, or would have there as floats, in float32."""
        return self._part(part, read_float).float()

    def read_part(self, part: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor by its name in the files, or some of its rows."""
        return read_rows(self._file(part), part, first, count)

    def _alias(self, name: str) -> str | None:
        """Return the name of a parameter, or of one that is tied to it, under which the files hold it, if they do."""
        return next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)

    def stored_name(self, name: str) -> str:
        """Return the name of a parameter, or of one tied to it, under which the files hold it.

        Raises:
            QuantizeError: they do not.
        """
        stored = self._alias(name)
        if stored is None:
            unused = [other for target, x in self.sources.items() if target not in self.ties for other in x.names]
            nearest = difflib.get_close_matches(name, unused, 1, 0.5)
            instead = f"; the nearest that it holds is {nearest[0]}" if nearest else ""
            raise QuantizeError(f"{self.directory} holds no tensor {name}, which the model needs{instead}")
        return stored

    def _kept_part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what is kept of a tensor."""
        if name not in self.kept:
            return tensor
        axis, places = self.kept[name]
        return tensor.index_select(axis, torch.tensor(places, device=tensor.device))

    def _read(self, name: str, read: Callable[[Path, str], Tensor]) -> Tensor:
        """Read one parameter; a merged adapter leaves it in the dtype that `read` has."""
        if name in self.computed:
            return self.computed[name]
        found = self._put_together(name, read)
        if self.remote is not None:  # other files are checked as a whole before a run
            require_finite(name, found)
        if self.adapter is not None:
            found = self.adapter.merged(self.ties.get(name, (name,)), found).to(found.dtype)
        return self._kept_part(name, found)

    def _put_together(self, name: str, read: Callable[[Path, str], Tensor]) -> Tensor:
        stored = self.stored_name(name)
        try:
            return self.sources[stored].read(stored, lambda part: self._part(part, read))
        except RuntimeError as error:  # the parts do not fit together
            raise QuantizeError(f"{name} cannot be put together from {self.directory} ({reason(error)})") from None

    def float_rows(self, name: str, count: int) -> Tensor:
        """Read some entries of the first axis, evenly spread, in float32; it raises what `tensor` raises."""
        source = self.stored(name)
        if source is None or source.converter is not None:
            whole = self.float_tensor(name)
            return whole[:: max(1, len(whole) // count)]
        total = self.read_shape(source.names[0])[0]
        picked = range(0, total, max(1, total // count))
        return torch.cat([self.read_part(source.names[0], row, 1).float() for row in picked])

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of what `tensor` reads, by the headers of the files; float32 if reading it is an error."""
        if self.is_config_alone:
            return self.dtype
        if self.module is not None:
            return self.module.get_parameter(name).dtype
        stored = self._alias(name)
        if stored is None or self.is_encoded(name):
            return torch.float32 if stored is None else self.dtype
        part = self.sources[stored].names[0]
        found = DTYPES.get(read_header(self.files[part]).entries[part].dtype, torch.float32)
        return found if found.is_floating_point and found.itemsize > 1 else torch.float32

    def is_encoded(self, name: str) -> bool:
        """Return whether a parameter is made of parts."""
        stored = self._alias(name)
        return stored is not None and any(part in self.encoded for part in self.sources[stored].names)

    def _part(self, name: str, read: Callable[[Path, str], Tensor]) -> Tensor:
        """Read a tensor by the name that it has in the files, or would have there as floats."""
        if name not in self.encoded:
            return read(self.files[name] if read is header_tensor else self._file(name), name)
        return self.encoded[name].read(name, self._stored)

    def _stored(self, part: str) -> Tensor:
        """Read a part as it is stored, or in float32 from a GGUF file."""
        path = self._file(part)
        return gguf.read_floats(path, part) if path.suffix == gguf.SUFFIX else read_tensor(path, part)

    def _file(self, part: str) -> Path:
        """Return the file that holds a tensor, if it is still what it was; if it lies on the hub, fetch it."""
        if self.remote is not None:
            self.remote.require(self.files[part])
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
