"""An artifact is exported as a GGUF file, which llama.cpp and transformers load."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType
from rich.console import Console

from quantize.artifact.writer import ArtifactWriter, as_json, translate_disk_errors
from quantize.checkpoint.sources.gguf import header_of
from quantize.export.gguf.architectures import ARCHITECTURES, add_metadata
from quantize.export.gguf.blocks import Blocks
from quantize.export.gguf.gguf_tokenizer import add_tokenizer
from quantize.export.gguf.parity import gguf_parity
from quantize.export.gguf.tensors import HEAD, gguf_tensors
from quantize.export.outline import Outline

FILE = "model.gguf"
VERSION = 2  # of the layout of blocks


def export_gguf(directory: Path, writer: ArtifactWriter, console: Console | None = None) -> dict[str, Any]:
    """Write `model.gguf`, and `config.json` for tools that want it beside the file; then compare.

    Args:
        directory: an artifact in which `obstacles` finds nothing.
        writer: an open writer; the caller writes the side files.
        console: the console that shows progress; None shows nothing.

    Returns:
        The entry `parity`: what `gguf_parity` measured. The entry `types`: how many tensors there are of each type.

    Raises:
        QuantizeError: a file is damaged, or what is read back computes something else.
    """
    outline = Outline.read(directory)
    config, path = outline.model_config(), writer.directory / FILE
    plain = {name: value for name, value in outline.config.items() if name != "quantization_config"}
    with translate_disk_errors(writer.output):
        types = write_gguf(path, gguf_tensors(directory, outline, console), config, directory)
    tied = HEAD not in header_of(path).places
    writer.write("config.json", as_json({**plain, "tie_word_embeddings": tied}))
    if console is not None:
        console.print(f"to run it: llama-cli -m {writer.output / FILE}", soft_wrap=True, markup=False)
    return {"parity": gguf_parity(directory, path, outline), "types": types}


def write_gguf(
    path: Path, tensors: Iterable[tuple[str, Blocks]], config: Mapping[str, Any], tokenizer: Path
) -> dict[str, int]:
    """Write a file, and return how many tensors there are of each type.

    Args:
        path: the new file.
        tensors: the tensors by their names in the file; they wait in a temporary file, as sizes are written first.
        config: the model's config with all defaults.
        tokenizer: the directory of the tokenizer.
    """
    file = GGUFWriter(path, MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]].arch], use_temp_file=True)
    types = Counter[str]()
    try:
        for name, tensor in tensors:
            types[tensor.type.name] += 1
            file.add_tensor(name, tensor.data.numpy(), raw_dtype=tensor.type)
        add_metadata(file, config)
        file.add_quantization_version(VERSION)
        file.add_file_type(file_type(types))
        add_tokenizer(file, tokenizer, config["vocab_size"])
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
    finally:
        file.close()
        if file.temp_file is not None:  # which the writer leaves open if tensors were not written
            file.temp_file.close()
    return dict(sorted(types.items()))


def file_type(types: Mapping[str, int]) -> LlamaFileType:
    """Return the format's name for a file with so many tensors of each type: the most frequent one but float32."""
    most = max(types.keys() - {"F32"}, key=lambda name: (types[name], name))
    return LlamaFileType.MOSTLY_MXFP4_MOE if most == "MXFP4" else LlamaFileType[f"MOSTLY_{most}"]
