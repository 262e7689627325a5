"""A GGUF file cannot hold some of what artifacts do."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from quantize.export.base import ONLINE, Obstacle
from quantize.export.outline import Outline


def obstacles(outline: Outline) -> Iterator[Obstacle]:
    """Yield what stands in the way: the package, the model, its tokenizer, and then all that the recipe does."""
    if find_spec("gguf") is None:
        yield Obstacle("the package gguf writes the file and is not installed", "pip install 'quantize-model[gguf]'")
        return
    from quantize.export.gguf.architectures import ARCHITECTURES, unsupported
    from quantize.export.gguf.gguf_tokenizer import tokenizer_obstacles

    if (kind := outline.config.get("model_type")) not in ARCHITECTURES:
        reason = f"GGUF files are written of {', '.join(ARCHITECTURES)}, and this is a model of the type {kind}"
        yield Obstacle(reason, "export it to another target, or run the artifact itself")
        return
    yield from unsupported(outline.model_config())
    yield from tokenizer_obstacles(outline.directory)
    if found := dict(unplaced(outline)):
        remedies = " and ".join(dict.fromkeys(found.values()))
        yield Obstacle(f"GGUF has no place for {' or '.join(found)}", f"quantize with {remedies}")


def unplaced(outline: Outline) -> Iterator[tuple[str, str]]:
    """Yield what the format has no place for, each with what to quantize with instead.

    Activations are no part of the format: llama.cpp rounds them to 8 bits in blocks of 32 by itself.
    """
    from quantize.export.gguf.blocks import block_of, type_of

    settings = outline.settings
    if settings.get("prefix"):
        yield "a prefix of tokens", "no `prefix`"
    if settings.get("kv_cache"):
        yield "how keys and values are quantized", "no table `kv_cache`, and give llama.cpp `--cache-type-k q8_0`"
    for path, scheme in outline.schemes().items():
        args, columns, block = scheme.weights, settings["modules"][path]["columns"], block_of(scheme.weights)
        if type_of(args) is None and args.format != "int":
            yield f"{args.format} weights", '`format = "int"` in [weights]'
        elif args.num_bits < 4:
            yield f"{args.num_bits}-bit weights", "--scheme W4A16"
        elif type_of(args) is None:
            yield f"{args.num_bits}-bit weights with zero points", "`symmetric = true` in [weights]"
        if columns % block:
            yield f"the {columns} columns of {path}, as blocks have {block}", f"--ignore {path}"
        elif args.format in ("int", "q4_1", "iq4_nl") and args.group_size % block:
            yield f"groups of {args.group_size} columns", f"--group-size {block} or a multiple"
        yield from (ONLINE[online["kind"]] for online in settings["modules"][path].get("online", ()))
    for path in settings.get("tables", ()):
        columns = outline.skeleton.get_parameter(f"{path}.weight").shape[1]
        if columns % 32:
            yield f"the {columns} columns of {path} in 8 bits, as blocks have 32", f"--ignore {path}"
