"""A model is opened by looking at its files, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn

from quantize.checkpoint.adapter import open_adapter
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.computed_tensors import computed_tensors
from quantize.checkpoint.files_seen import FilesSeen
from quantize.checkpoint.hub import download
from quantize.checkpoint.key_mapping import StoredTensor, finder, map_keys, plain_names
from quantize.checkpoint.meta_model import build_on_meta, native_class, ties_of
from quantize.checkpoint.model_config import config_of, read_config
from quantize.checkpoint.parametrized import with_plain_weights
from quantize.checkpoint.paths import SIDE_FILES, find_model, folder_of, require_config
from quantize.checkpoint.remote_code import code_files
from quantize.checkpoint.remote_shards import RemoteShards
from quantize.checkpoint.safetensors_reader import read_header
from quantize.checkpoint.size_limits import NoFiles
from quantize.checkpoint.sources import find_encoded, gguf
from quantize.checkpoint.sources.encoded import Encoded
from quantize.checkpoint.sources.settings import SETTINGS_FILES, float_dtype, split_settings
from quantize.checkpoint.stored_ties import kept_apart, told_apart, without_ties
from quantize.checkpoint.tensor_files import index_tensors
from quantize.checkpoint.untrusted_files import has_config_alone, is_hidden, links_followed, read_json
from quantize.checkpoint.wrappers import dropped
from quantize.errors import UsageError

NOT_COPIED = {"config.json", "manifest.json"} | SETTINGS_FILES


def open_checkpoint(
    model: str | Path | RemoteShards | nn.Module,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Checkpoint:
    """Find a model's parts without reading a weight.

    Args:
        model: a directory, which never touches a network; one file of weights beside its config; a hub id, perhaps
            with `@` and a revision behind it; the hub's files of which few are on disk; or a module.
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
    stored = open_files(model, weights)
    directory, files, seen, encoded = stored.directory or Path(), stored.files, stored.seen, stored.encoded
    gguf_file = next((path for path in files.values() if path.suffix == gguf.SUFFIX), None)
    floats = as_floats(files, encoded)
    config, _ = split_settings(read_config(directory, None if gguf_file else floats), directory)
    code = directory if trust_remote_code and native_class(config) is None else None
    seen.stamps.update(FilesSeen.of(code_files(code)).stamps if code else {})
    built = build_on_meta(config, files, code)
    if gguf_file is not None:
        encoded = gguf.find(gguf_file, built)
        floats = dict.fromkeys(encoded, gguf_file)
    names = plain_names(built, floats)
    sources = map_keys(built, names)
    plain = {name: source for name, source in sources.items() if not encoded.keys() & {*source.names}}
    compared = plain if stored.has_weights else {}
    if apart := told_apart(ties_of(built), compared, files, stored.remote.require if stored.remote else None):
        config = without_ties(config)
        built = build_on_meta(config, files, code)
        sources = map_keys(built, names)
    ties, find = ties_of(built), finder(built)
    if still := [pair for pair in apart if pair[1] in ties.get(pair[0], ())]:
        raise UsageError(f"{directory} holds {' and '.join(still[0])}, which differ though the model ties them")
    return replace(
        stored,
        config=config,
        ties=ties,
        sources=sources,
        adapter=None if adapter is None else open_adapter(Path(adapter), lambda name: find(name)[0], ties),
        notes=(*stored.notes, *dropped(names), *no_place(built, sources), *map(kept_apart, apart)),
        code=code,
        encoded=encoded,
        computed=computed_tensors(built, sources),
    )


def open_files(model: str | Path | RemoteShards, weights: bool = True) -> Checkpoint:
    """Find a model's files without its class: tensors have the names that they have, or would have as floats, in them.

    Args:
        model: a directory, one file of weights beside its config, a hub id, or the hub's files of which few are here.
        weights: whether a directory must have weights; otherwise a config alone is enough.

    Raises:
        UsageError: there is no such model, or it is quantized by a method that cannot be read.
        QuantizeError: the files are damaged.
    """
    remote = model if isinstance(model, RemoteShards) else None
    given = model.directory if isinstance(model, RemoteShards) else model
    place = find_model(given) or download(*str(given).split("@"))
    directory = folder_of(place)
    require_config(directory)
    links, files = links_followed(directory), files_of(place, weights)
    beside = [directory / path for path in (Path("config.json"), *side_files(directory))]
    is_gguf = place.suffix == gguf.SUFFIX and place.is_file()
    headers = [] if is_gguf else [read_header(path).entries for path in sorted(set(files.values()))]
    entries = {name: entry for header in headers for name, entry in header.items()}
    config, settings = split_settings(read_json(directory / "config.json"), directory)
    encoded = {} if settings is None or is_gguf else find_encoded(settings, entries, str(directory))
    seen = FilesSeen.of({*files.values(), *beside})
    seen.remote = {} if remote is None else remote.hashes
    return Checkpoint(
        directory,
        config,
        files,
        sources={name: StoredTensor((name,)) for name in as_floats(files, encoded)},
        seen=seen,
        remote=remote,
        notes=(f"{len(links)} files are links and are followed: {links[0]}",) if links else (),
        encoded=encoded,
        dtype=float_dtype(config, entries),
    )


def files_of(place: Path, weights: bool) -> dict[str, Path]:
    """Map tensor names to files, of a directory or of one file; without `weights` a directory may have none."""
    if place.is_dir():
        return index_tensors(place) if weights or not has_config_alone(place) else NoFiles()
    return dict.fromkeys(
        gguf.header_of(place).places if place.suffix == gguf.SUFFIX else read_header(place).entries, place
    )


def as_floats(files: Mapping[str, Path], encoded: Mapping[str, Encoded]) -> dict[str, Path]:
    """Map the names that tensors have, or would have as floats, to files; one made of parts lies with its first."""
    parts = {part for found in encoded.values() for part in found.parts.values()}
    stored = {name: path for name, path in files.items() if name not in parts}
    return stored | {name: files[next(iter(found.parts.values()))] for name, found in encoded.items()}


def no_place(model: nn.Module, found: Iterable[str]) -> list[str]:
    """Say in a sentence which tensors of the files the model has no place for, if there are any."""
    places = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    left = sorted(name for name in found if name not in places)
    if not left:
        return []
    return [f"{len(left)} tensors of the files have no place in the model and are left out, such as {left[0]}"]


def side_files(directory: Path) -> list[Path]:
    """List the tokenizer's and other small files to take along, relative to the directory."""
    found = (p.relative_to(directory) for p in sorted(directory.rglob("*")) if p.is_file() and p.suffix in SIDE_FILES)
    return [p for p in found if str(p) not in NOT_COPIED and not p.name.endswith(".index.json") and not is_hidden(p)]
