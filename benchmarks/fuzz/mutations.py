"""Sound files are broken by seeded generators, each kind of file in the ways that reach deepest."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.artifact.manifest import digest_of
from quantize.checkpoint.files_seen import sha256

SETTINGS = ["--scheme", "W8A8", "--group-size", "0", "--nsamples", "2", "--seqlen", "16"]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 1e308, 10**7, 2**63, float("nan")),
    *("", "x", "../..", "re:(", "9" * 99, [], [[]], {}, {"a": 1}),
)  # fmt: skip
KEYS = (
    "scheme", "seed", "ignore", "targets", "passes", "quantizer", "weights", "activations", "kv_cache", "layers",
    "num_bits", "symmetric", "group_size", "clip_ratio", "name", "alpha", "prefix", "tune", "tables",
)  # fmt: skip
Rng = random.Random
Sound = Mapping[str, Path]  # kind of file → a sound one


def json_value(value: Any, rng: Rng) -> Any:
    """Return plain data with one value replaced or left out, most likely deep inside."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        rest = {name: item for name, item in value.items() if name != key}
        return rest if rng.random() < 0.2 else {**rest, key: json_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], json_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(ODD)


def change_json(path: Path, rng: Rng) -> None:
    """Change one value of a JSON file."""
    path.write_text(json.dumps(json_value(json.loads(path.read_text()), rng)))


def change_bytes(path: Path, rng: Rng) -> None:
    """Flip a bit, cut, insert noise, write zeros, or leave nothing."""
    content = bytearray(path.read_bytes())
    at, how = rng.randrange(len(content) + 1), rng.randrange(5)
    if how == 0 and at < len(content):
        content[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del content[at:]
    elif how == 2:
        content[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif how == 3:
        content[at : at + 64] = bytes(64)
    else:
        content.clear()
    path.write_bytes(content)


def change_tensors(path: Path, rng: Rng) -> None:
    """Give one tensor another shape, type, name or values, or change what the header says of all."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in sorted(file.keys())}
    if "stored" in metadata and rng.random() < 0.6:
        metadata["stored"] = json.dumps(json_value(json.loads(metadata["stored"]), rng))
    else:
        name = rng.choice(sorted(tensors))
        changed = tensor_like(tensors.pop(name), rng)
        tensors |= {} if changed is None else {rng.choice([name] * 9 + [f"other.{name}"]): changed}
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, path, metadata)


def tensor_like(x: Tensor, rng: Rng) -> Tensor | None:
    """Return a tensor that differs from x, or None."""
    wrong = rng.choice([float("nan"), float("inf"), 0.0, -1.0, 1e30])
    ways: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: x.flatten()[:-1],
        lambda: x.to(rng.choice([torch.float16, torch.int64, torch.uint8, torch.float64])),
        lambda: (
            torch.full(x.shape, wrong).to(x.dtype) if x.is_floating_point() and x.element_size() > 1 else x.flatten()
        ),
        lambda: torch.zeros(0, dtype=x.dtype),
        lambda: x[None],
        lambda: x,
    ]
    return rng.choice(ways)()


def toml(value: Any) -> str:
    """Return plain data as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {toml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return repr(value).replace("e+", "e") if isinstance(value, float) else json.dumps(value)


def random_value(rng: Rng, depth: int = 0) -> Any:
    """Return a value for a recipe."""
    if depth > 3 or rng.random() < 0.4:
        return rng.choice(
            [*ODD[1:], 4, 8, 128, "W4A8", "W8A8", "rtn", "gptq", "rotate", "x" * 5000, "re:.*", "re:(a*)*b"]
        )
    if rng.random() < 0.5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def broken(kind: str, sound: Sound, folder: Path, rng: Rng) -> list[str]:
    """Write a broken file of a kind into a folder, and return the arguments of a command that reads it."""
    quantize = [*SETTINGS, "--output-dir", str(folder / "out")]
    if kind == "recipe":
        lines = (f"{key} = {toml(random_value(rng))}" for key in rng.sample(KEYS, rng.randrange(1, 4)))
        (folder / "r.toml").write_text("\n".join(lines))
        return [str(sound["model"]), *quantize, "--recipe", str(folder / "r.toml")]
    if kind == "text":
        path = folder / sound["text"].name
        shutil.copy(sound["text"], path)
        change_bytes(path, rng)
        return [str(sound["model"]), *quantize, "--calibration", str(path)]
    if kind == "table":
        path = Path(shutil.copy(rng.choice(sorted(sound["tables"].iterdir())), folder))
        (change_json if path.suffix == ".json" and rng.random() < 0.7 else change_bytes)(path, rng)
        return [str(sound["model"]), *quantize, "--calibration", str(path)]
    if kind == "statistics":
        path = folder / "a.stats"
        shutil.copy(sound["statistics"], path)
        rng.choice([change_tensors, change_tensors, change_bytes])(path, rng)
        return ["merge-stats", str(path), str(sound["other statistics"]), "--output", str(folder / "out")]
    copied = folder / "m"
    shutil.copytree(sound["onnx" if kind == "onnx" else "model" if kind in MODEL_FILES else "artifact"], copied)
    if kind in MODEL_FILES:
        path = copied / rng.choice(MODEL_FILES[kind])
        rng.choice([change_tensors if kind == "weights" else change_json, change_bytes])(path, rng)
        return [str(copied), *quantize]
    if kind == "manifest":
        rng.choice([change_json, change_json, change_json, change_bytes])(copied / "manifest.json", rng)
        seal(copied, rng)
        return rng.choice([["verify", str(copied)], ["report", str(copied), "--output", str(folder / "page.html")]])
    path = rng.choice(sorted(path for path in copied.iterdir() if path.is_file()))
    change_one(path, rng)
    seal(copied, rng)
    if kind == "onnx":
        return ["run", str(copied), "--prompt", "a b c", "--max-new-tokens", "3"]
    export = ["export", str(copied), "--format", "safetensors-float", "--output-dir", str(folder / "out")]
    return rng.choice([["verify", str(copied)], ["inspect", str(copied)], export])


def seal(directory: Path, rng: Rng) -> None:
    """Most times let the manifest hold the hashes that files have now, and its digest, as a stranger would."""
    path = directory / "manifest.json"
    if rng.random() < 0.2:
        return
    try:
        manifest = json.loads(path.read_text())
        manifest["files"] = {name: sha256(directory / name) for name in manifest["files"]}
        manifest["digest"] = digest_of(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, OSError):  # it is broken itself
        return
    path.write_text(json.dumps(manifest))


MODEL_FILES = {
    "config": ["config.json"], "weights": ["model.safetensors"],
    "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
}  # fmt: skip
KINDS = ("recipe", "config", "weights", "tokenizer", "text", "table", "statistics", "manifest", "artifact", "onnx")


def change_one(path: Path, rng: Rng) -> None:
    """Change a file in the way of its kind, or its bytes."""
    ways = {".json": change_json, ".safetensors": change_tensors}
    (ways.get(path.suffix, change_bytes) if rng.random() < 0.7 else change_bytes)(path, rng)
