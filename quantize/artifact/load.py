"""An artifact is loaded by reading its manifest and putting its tensors into the architecture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantize.artifact.manifest import REQUIRED, Manifest, digest_of
from quantize.artifact.quantization_config import linear_scheme
from quantize.artifact.saving import saved_again
from quantize.artifact.writer import PROBE
from quantize.checkpoint.files_seen import sha256
from quantize.checkpoint.meta_model import assign_and_tie, build_bounded, native_class
from quantize.checkpoint.model_config import read_config
from quantize.checkpoint.parametrized import with_plain_weights
from quantize.checkpoint.paths import no_artifact, require_artifact
from quantize.checkpoint.remote_code import code_files
from quantize.checkpoint.safetensors_reader import read_rows
from quantize.checkpoint.tensor_files import CHUNK, header_tensor, index_tensors, read_tensor, require_finite
from quantize.checkpoint.untrusted_files import check_files, read_json
from quantize.errors import QuantizeError, UsageError, shown
from quantize.formats import get_format
from quantize.formats.qtensor import QTensor
from quantize.nn.attention import set_kv_cache
from quantize.nn.device import on_device, resolve_device
from quantize.nn.kv_cache import read_kv_cache
from quantize.nn.prefix_hooks import attach
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_embedding import quantize_embedding
from quantize.nn.quantized_experts import QuantizedExperts, quantized_product, replace_parameter
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.nn.quantized_weight import QuantizedWeight
from quantize.recipe.validation import validated
from quantize.scheme.scheme import ENGINES, Engine
from quantize.transforms.online import Online, restore

Read = Callable[[Path, str], Tensor]  # a file and a name → the tensor


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read `manifest.json` of an artifact.

    Raises:
        UsageError: there is no manifest, it is not valid, or the directory links to files elsewhere.
    """
    require_artifact(directory)
    path, why = directory / "manifest.json", ""
    try:
        manifest = read_json(path)
    except QuantizeError as error:
        manifest, why = {}, f": {error}"
    if not manifest.keys() >= REQUIRED:
        raise no_artifact(directory, why)
    validated(lambda: Manifest.model_validate_json(json.dumps(manifest), strict=True), str(path))
    check_files(directory)
    return manifest


def check_hashes(directory: Path, digest: str | None = None) -> int:
    """Compare the manifest with its digest and every file with the manifest, and return how many files there are.

    Args:
        directory: an artifact.
        digest: the digest that the run printed; None trusts the one in the manifest, which whoever changes a file can
            change as well.

    Raises:
        UsageError: the directory is no artifact.
        QuantizeError: the digest is another one, or a file is missing, changed or not listed; the message names it.
    """
    manifest = read_manifest(directory)
    found, listed = digest_of(manifest), manifest["files"]
    if manifest.get("digest") != found:
        raise QuantizeError(f"{directory / 'manifest.json'} has changed since it was written: its digest is {found}")
    if digest not in (None, found):
        raise QuantizeError(f"the digest of {directory} is {found} and not {shown(digest)}; fetch the artifact anew")
    paths = {str(path.relative_to(directory)): path for path in directory.rglob("*") if not path.is_dir()}
    for name in sorted((paths.keys() | listed) - {"manifest.json"}):
        if name not in listed or name not in paths:
            raise QuantizeError(f"{directory / name} is {'missing' if name in listed else 'not in the manifest'}")
        if not paths[name].is_file():
            raise QuantizeError(f"{directory / name} is no regular file")
        if sha256(directory / name) != listed[name]:
            raise QuantizeError(f"{directory / name} has changed since it was written")
    return len(listed)


def load(
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    skeleton: nn.Module | None = None,
    engine: Engine = "fake_quant",
    read: Read | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    keep_stored: bool = False,
) -> nn.Module:
    """Load the quantized model in evaluation mode; for a causal language model `generate` works.

    Args:
        directory: an artifact.
        dtype: the dtype of all parameters that are not integers, and so of the computation.
        skeleton: the architecture, for artifacts of modules that transformers does not know; its weights are replaced.
        engine: how quantized linears run on a CPU. `fake_quant` holds each weight dequantized in `dtype` and multiplies
            in floating point; `reference` multiplies integers and sums them exactly, for proofs, and is slow.
        read: how tensors are read: None reads them into memory; what returns them on the meta device loads a model that
            computes nothing, to see whether all has its place.
        trust_remote_code: whether code of the model's own may run; its files must be those of the manifest.
        device: where the model will run. On a GPU each weight is laid out for the kernels and held once, so that the
            model compiles without a graph break before it has run; None leaves it on the CPU, to be moved as it is.
        keep_stored: hold the weights as they are stored as well, so that the model can move and be saved.

    Raises:
        UsageError: the directory is no artifact, or there is no such engine or device.
        QuantizeError: its files are damaged.
    """
    directory = Path(directory)
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {shown(engine)}; choose {' or '.join(ENGINES)}")
    if not directory.is_dir():
        raise UsageError(f"no such artifact: {directory}")
    manifest = read_manifest(directory)
    settings = manifest["quantization"]
    if skeleton is None and not (directory / "config.json").is_file():
        raise UsageError(
            f"{directory} holds the weights of a module that transformers does not know; give a module of its class as "
            "skeleton, whose weights are replaced"
        )
    if skeleton is None and manifest.get("model_free") and (why := without_class(directory)):
        raise UsageError(
            f"{directory} was rounded without the model, and {why}; update transformers, or give a module of that "
            "class as skeleton"
        )
    if skeleton is None:
        code = directory if trust_remote_code else None
        for path in code_files(directory) if code else ():
            if sha256(path) != manifest["files"].get(path.name):
                raise QuantizeError(f"{path} is not as the run wrote it, so it is not run")
        skeleton = build_bounded(read_config(directory), index_tensors(directory, PROBE), code)
    elif not isinstance(skeleton, PreTrainedModel):
        skeleton = with_plain_weights(skeleton)
    model = fill(skeleton, directory, settings, dtype, read)
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.engine = engine
    if isinstance(model, PreTrainedModel):
        saved_again(model, directory)
    return model if device is None else on_device(model, resolve_device(device), dtype, keep_stored)


def without_class(directory: Path) -> str:
    """Say, in half a sentence, that transformers has no class for an artifact's model; '' if it has one."""
    config = read_json(directory / "config.json")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else config.get("model_type")
    if isinstance(names, list) and names and native_class(config) is not None:
        return ""
    return f"transformers {transformers.__version__} has no class for {shown(name)}"


def fill(
    model: nn.Module,
    directory: Path,
    settings: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    read: Read | None = None,
) -> nn.Module:
    """Put the tensors of an artifact into its architecture.

    Args:
        model: the architecture; its weights are replaced.
        directory: an artifact, which need not have its manifest yet.
        settings: its quantization settings.
        dtype: the dtype of all parameters that are not integers.
        read: how tensors are read, as in `load`.

    Raises:
        QuantizeError: the files are damaged, or belong to another model.
    """
    read = read or read_checked
    files = index_tensors(directory, PROBE)
    try:
        for path in settings["modules"]:
            put_in_place(model, path, read_linear(path, settings, files, dtype, read))
        for path in settings.get("tables", ()):
            qweight, scale = read_table(path, files, read)
            quantize_embedding(model.get_submodule(path), qweight, scale.to(dtype), path)
    except (AttributeError, ValueError) as error:  # there is no such module, or the name is empty
        raise QuantizeError(f"{directory} does not fit the model: {error}") from None
    quantized = (*settings["modules"], *settings.get("tables", ()))
    modules = {path: model.get_submodule(path).state_dict() for path in quantized}
    held = {
        f"{path}.{name}": t for path, state in modules.items() for name, t in state.items()
    }  # scales of FP4 keep their dtype
    tensors = {name: read(file, name) for name, file in files.items() if name not in held}
    wrong = assign_and_tie(model, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()})
    if wrong:
        raise QuantizeError(f"{directory} does not fit the model: {wrong[0]} is in one of them only")
    set_kv_cache(model, read_kv_cache(settings))
    if settings.get("prefix"):
        attach(model, settings["prefix"])
    return model.eval()


def put_in_place(model: nn.Module, path: str, found: QuantizedLinear | QuantizedExperts) -> None:
    """Put a quantized linear in the place of a module, or experts in the place of a parameter.

    Raises:
        AttributeError: the model has no such module, or no such parameter.
        QuantizeError: it has one of another shape.
    """
    if isinstance(found, QuantizedLinear):
        check_place(model.get_submodule(path), found, path)
        model.set_submodule(path, found)
        return
    if (has := model.get_parameter(path).shape) != found.shape:
        raise QuantizeError(f"{path} is {list(has)} in the model, and its experts in the artifact {list(found.shape)}")
    replace_parameter(model, path, found)


def read_checked(file: Path, name: str) -> Tensor:
    """Read one tensor, whose numbers must be finite.

    Raises:
        QuantizeError: it cannot be read, or one of its numbers is not finite.
    """
    return require_finite(name, read_tensor(file, name), file)


def checked_on_meta(file: Path, name: str) -> Tensor:
    """Check the numbers of a tensor, some rows at a time, and return it on the meta device.

    Raises:
        QuantizeError: it cannot be read, or one of its numbers is not finite.
    """
    found = header_tensor(file, name)
    rows = max(1, CHUNK // max(1, found[:1].numel())) if found.dim() else None
    for first in range(0, len(found), rows) if rows else [0]:
        require_finite(name, read_rows(file, name, first, rows), file)
    return found


def read_linear(
    path: str,
    settings: dict[str, Any],
    files: Mapping[str, Path],
    dtype: torch.dtype,
    read: Read = read_checked,
) -> QuantizedLinear | QuantizedExperts:
    """Read one quantized linear of an artifact, or a stack of experts, as the `quantization_config` describes it.

    With `header_tensor` for `read`, weight, scales and bias are on the meta device, and the caller checks them later.
    """

    def get(name: str) -> Tensor | None:
        key = f"{path}.{name}"
        return read(files[key], key) if key in files else None

    scheme, entry = linear_scheme(settings, path), settings["modules"][path]
    data, scale, bias = get("qweight"), get("scale"), get("bias")
    if data is None or scale is None:
        raise QuantizeError(f"the artifact lists {path} as quantized but holds no integers for it")
    scale = scale.to(dtype) if {scale.dtype, dtype} <= get_format(scheme.weights.format).scale_dtypes else scale
    weight = QTensor(data, scale, get("zero_point"), entry["columns"], scheme.weights, get("global_scale"))
    if not data.is_meta:
        weight.check(path)
    if bias is not None and bias.shape != (len(data),):
        raise QuantizeError(f"the bias of {path} has the shape {list(bias.shape)} for {len(data)} rows of weights")
    parts = enumerate(entry.get("online", ()))
    online = [read_online(f"{path}.transform.{i}.", given, files, weight.columns) for i, given in parts]
    experts = entry.get("experts")
    if experts is not None and len(data) % experts:
        raise QuantizeError(f"{path} has {len(data)} rows of weights, which are not those of {experts} experts")
    bias = None if bias is None else bias.to(dtype)
    linear = quantized_product(weight, bias, scheme, online, experts, bool(entry.get("transposed")))
    if isinstance(linear, QuantizedLinear):
        linear.leading = PrefixTokens(tuple(settings.get("prefix", ())))
    else:
        linear.computes_in = linear.computes_in.to(dtype)
    return linear


def read_table(path: str, files: Mapping[str, Path], read: Read = read_checked) -> tuple[Tensor, Tensor]:
    """Read the integers [V, K] and the scales [V, 1] of a table of words.

    Raises:
        QuantizeError: the files lack one of them.
    """
    names = [f"{path}.qweight", f"{path}.scale"]
    if missing := [name for name in names if name not in files]:
        raise QuantizeError(f"the artifact lists {path} as a table in 8 bits but holds no {missing[0]}")
    qweight, scale = (read(files[name], name) for name in names)
    return qweight, scale


def check_place(module: nn.Module, linear: QuantizedLinear, path: str) -> None:
    """Check that a linear takes the place of a module that holds a matrix of its shape.

    Raises:
        QuantizeError: it does not.
    """
    shape = {linear.in_features, linear.out_features}
    if not any(p.dim() == 2 and set(p.shape) == shape for p in module.parameters(recurse=False)):
        raise QuantizeError(
            f"{path} holds no matrix of {linear.out_features} rows and {linear.in_features} columns in the model"
        )


def read_online(prefix: str, given: dict[str, Any], files: Mapping[str, Path], columns: int) -> Online:
    """Read one online transform of [..., columns], whose tensors have names that start with `prefix`.

    Raises:
        QuantizeError: there is no such transform.
    """
    names = [name for name in files if name.startswith(prefix)]
    tensors = {name.removeprefix(prefix): read_checked(files[name], name) for name in names}
    try:
        online = restore(given, tensors, columns)
        fits = online(torch.zeros(1, columns)).shape == (1, columns)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise QuantizeError(
            f"{prefix}: {given} with {', '.join(tensors) or 'no tensors'} is no transform ({error})"
        ) from None
    if not fits:
        raise QuantizeError(f"{prefix}: {given} is no transform of {columns} channels")
    return online
