"""A model's weights, config and side files come from a directory, from the hub, or from a module in memory."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quantize.checkpoint.adapter import Adapter, open_adapter
from quantize.checkpoint.architecture import name_architecture
from quantize.checkpoint.computed_tensors import computed_tensors
from quantize.checkpoint.files_seen import FilesSeen
from quantize.checkpoint.hub import download
from quantize.checkpoint.key_mapping import StoredTensor, finder, map_keys, plain_names
from quantize.checkpoint.meta_model import assign_and_tie, build_on_meta, build_skeleton, load_tensors, ties_of
from quantize.checkpoint.parametrized import with_plain_weights
from quantize.checkpoint.paths import find_model, require_config
from quantize.checkpoint.remote_code import code_files
from quantize.checkpoint.safetensors_reader import DTYPES, read_header, read_rows
from quantize.checkpoint.size_limits import NoFiles
from quantize.checkpoint.sources import find_encoded, gguf
from quantize.checkpoint.sources.encoded import Encoded
from quantize.checkpoint.sources.settings import SETTINGS_FILES, float_dtype, split_settings
from quantize.checkpoint.stored_ties import kept_apart, told_apart, without_ties
from quantize.checkpoint.tensor_files import header_tensor, index_tensors, read_float, read_tensor, require_finite
from quantize.checkpoint.untrusted_files import SIDE_FILES, has_config_alone, is_hidden, links_followed, read_json
from quantize.checkpoint.wrappers import dropped
from quantize.errors import QuantizeError, UsageError, reason

# Classifiers without a padding token refuse more than one row, as they could not tell padding from text. A run's rows
# have no padding, which an id says that no token has.
NO_TOKEN = -1
NOT_COPIED = {"config.json", "manifest.json"} | SETTINGS_FILES


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
    kept: Mapping[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def bounds(self) -> Mapping[str, Path] | None:
        """The files that bound what may be built from the config; None for a module, whose config is one's own."""
        return self.files if self.module is None else None

    @property
    def is_config_alone(self) -> bool:
        """Whether there are no weights, so that a run can only be estimated."""
        return isinstance(self.files, NoFiles)

    def skeleton(self) -> nn.Module:
        """Build the model in float32 with parameters on the meta device, tied parameters shared, and real buffers."""
        if self.module is None or self.kept:
            model = build_skeleton(self.config, self.bounds, self.code)
            stored = self.sources if self.module is None else self.module.state_dict()
            buffers = [name for name in model.state_dict() if name not in self.ties and name in stored]
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

    def on_meta(self, name: str) -> Tensor:
        """Return a parameter on the meta device, as far as may be by the headers of the files."""
        if self.module is not None or self.is_encoded(name) or name in self.computed:
            return self.tensor(name).to("meta")
        return self._kept_part(name, self._put_together(name, header_tensor))

    def stored(self, name: str) -> StoredTensor | None:
        """Return where a parameter lies as it is in files; None if it lies elsewhere, or is made, merged or pruned."""
        apart = self.module is not None or self.adapter is not None or self.is_encoded(name)
        left_out = name in self.kept or name in self.computed
        return None if apart or left_out else self.sources[self._stored_name(name)]

    def read_shape(self, part: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in the files."""
        return tuple(header_tensor(self._file(part), part).shape)

    def read_part(self, part: str, first: int = 0, count: int | None = None) -> Tensor:
        """Read a tensor by its name in the files, or some of its rows."""
        return read_rows(self._file(part), part, first, count)

    def _stored_name(self, name: str) -> str:
        """Return the name of a parameter, or of one that is tied to it, under which the files hold it."""
        stored = next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)
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
        if self.adapter is not None:
            found = self.adapter.merged(self.ties.get(name, (name,)), found).to(found.dtype)
        return self._kept_part(name, found)

    def _put_together(self, name: str, read: Callable[[Path, str], Tensor]) -> Tensor:
        stored = self._stored_name(name)
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
        stored = next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)
        if stored is None or self.is_encoded(name):
            return torch.float32 if stored is None else self.dtype
        part = self.sources[stored].names[0]
        found = DTYPES.get(read_header(self.files[part]).entries[part].dtype, torch.float32)
        return found if found.is_floating_point and found.itemsize > 1 else torch.float32

    def is_encoded(self, name: str) -> bool:
        """Return whether a parameter is made of parts."""
        stored = next((alias for alias in self.ties.get(name, (name,)) if alias in self.sources), None)
        return stored is not None and any(part in self.encoded for part in self.sources[stored].names)

    def _part(self, name: str, read: Callable[[Path, str], Tensor]) -> Tensor:
        """Read a tensor by the name that it has in the files, or would have there as floats."""
        if name not in self.encoded:
            return read(self._file(name), name)
        return self.encoded[name].read(name, self._stored)

    def _stored(self, part: str) -> Tensor:
        """Read a part as it is stored, or in float32 from a GGUF file."""
        path = self._file(part)
        return gguf.read_floats(path, part) if path.suffix == gguf.SUFFIX else read_tensor(path, part)

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
    return [p for p in found if str(p) not in NOT_COPIED and not p.name.endswith(".index.json") and not is_hidden(p)]


def open_checkpoint(
    model: str | Path | nn.Module,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Checkpoint:
    """Find a model's parts without reading a weight.

    Args:
        model: a directory, which never touches a network; one file of weights beside its config; a hub id, perhaps
            with `@` and a revision behind it; or a module.
        adapter: the directory of a LoRA adapter of the model, which is merged into the weights while they are read.
        trust_remote_code: whether code of the model's own may run, if transformers has no class for it.
        weights: whether a directory must have weights; otherwise a config alone is enough.

    Raises:
        UsageError: there is no such model or adapter, or it cannot be quantized.
        QuantizeError: the files are damaged.
    """
    if isinstance(model, nn.Module):
        if adapter is not None:
            raise UsageError("an adapter is merged into a directory's weights; merge it into the module yourself")
        plain_module = model if isinstance(model, transformers.PreTrainedModel) else with_plain_weights(model)
        return Checkpoint(None, config_of(model), module=plain_module, ties=ties_of(plain_module))
    place = find_model(model) or download(*str(model).split("@"))
    directory = place if place.is_dir() else place.parent
    require_config(directory)
    links = links_followed(directory)
    is_gguf = place.suffix == gguf.SUFFIX and place.is_file()
    if place.is_file():
        files = dict.fromkeys(gguf.places(place) if is_gguf else read_header(place).entries, place)
    else:
        files = index_tensors(directory) if weights or not has_config_alone(directory) else NoFiles()
    code = directory if trust_remote_code else None
    beside = [directory / path for path in (Path("config.json"), *side_files(directory))]
    seen = FilesSeen.of({*files.values(), *beside, *(code_files(code) if code else ())})
    _, settings = split_settings(read_json(directory / "config.json"), directory)
    headers = [] if is_gguf else [read_header(path).entries for path in sorted(set(files.values()))]
    entries = {name: entry for header in headers for name, entry in header.items()}
    encoded = {} if settings is None or is_gguf else find_encoded(settings, entries, str(directory))
    parts = {part for found in encoded.values() for part in found.parts.values()}
    stored = {name: path for name, path in files.items() if name not in parts}
    floats = stored | {name: files[next(iter(found.parts.values()))] for name, found in encoded.items()}
    config, _ = split_settings(read_config(directory, None if is_gguf else floats), directory)
    built = build_on_meta(config, files, code)
    if is_gguf:
        encoded = gguf.find(place, built)
        floats = dict.fromkeys(encoded, place)
    names = plain_names(built, floats)
    sources = map_keys(built, names)
    plain = {name: source for name, source in sources.items() if not encoded.keys() & {*source.names}}
    if apart := told_apart(ties_of(built), plain, files):
        config, built = without_ties(config), build_on_meta(without_ties(config), files, code)
        names = plain_names(built, floats)
        sources = map_keys(built, names)
    ties = ties_of(built)
    if still := [pair for pair in apart if pair[1] in ties.get(pair[0], ())]:
        raise UsageError(f"{directory} holds {' and '.join(still[0])}, which differ though the model ties them")
    merged = None if adapter is None else open_adapter(Path(adapter), lambda name: finder(built)(name)[0], ties)
    notes = [f"{len(links)} files are links and are followed: {links[0]}"] if links else []
    said = [*notes, *dropped(names), *no_place(built, sources), *map(kept_apart, apart)]
    dtype = float_dtype(config, entries)
    computed = computed_tensors(built, sources)
    found = (merged, tuple(said), code, encoded, dtype, computed)
    return Checkpoint(directory, config, files, None, ties, sources, seen, *found)


def no_place(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Say in a sentence which tensors of the files the model has no place for, if there are any."""
    places = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    left = sorted(name for name in found if name not in places)
    return (
        [f"{len(left)} tensors of the files have no place in the model and are left out, such as {left[0]}"]
        if left
        else []
    )


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the config of a transformers model with the name of its class; it is empty for any other module."""
    if not isinstance(model, transformers.PreTrainedModel):
        return {}
    return {**model.config.to_dict(), "architectures": [type(model).__name__], "dtype": str(model.dtype).split(".")[-1]}


def read_config(directory: Path, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Read `config.json` as a dict; an architecture that it does not name follows from `files`, tensor name → file."""
    path = require_config(directory)
    config = read_json(path)
    if files is not None and not config.get("architectures"):
        config["architectures"] = [name_architecture(config, files)]
    if not isinstance(config.get("architectures"), list) or not config["architectures"]:
        raise UsageError(f"{path} does not name its architecture; add the key architectures")
    if not isinstance(config.get("model_type", ""), str):
        raise UsageError(f"{path} does not name its model_type")
    return config
