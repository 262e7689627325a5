"""`make bench-layers` prints the peak of memory of quantizing layers of the shapes of large mixtures to W4A16.

The layers are those of the models' configs with a small vocabulary. Their weights are random as far as `RANDOM_BYTES`
go; the others are zeros that take no room on the disk, as the file has holes there, and are read and rounded like all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import torch

from benchmarks.whole_models import MODELS, write_config
from quantize.checkpoint.key_mapping import as_stored
from quantize.checkpoint.meta_model import build_on_meta
from quantize.checkpoint.safetensors_writer import RowWriter
from quantize.checkpoint.size_limits import NoFiles
from quantize.pipeline.estimate.report import human

PLAIN, DEFAULT = "plain rounding", "the default recipe"
PLAIN_RECIPE = 'passes = []\nquantizer = { name = "rtn" }\n'
TOKENS = {PLAIN: 64, DEFAULT: 2048}  # of calibration data
ROW = 512  # tokens of a row
LAYERS = {"Qwen3-30B-A3B": 2, "DeepSeek-V3": 1}
SMALL = {"vocab_size": 1024, "max_position_embeddings": 4096, "first_k_dense_replace": 0}
EXPERTS = {"Qwen3-30B-A3B": "num_experts", "DeepSeek-V3": "n_routed_experts"}  # keys of their configs
RANDOM_BYTES = 3 << 30


def write_model(directory: Path, name: str, experts: int | None) -> int:
    """Write a model of some layers, with fewer experts if a number is given, and return the bytes of its weights."""
    model_type, settings = MODELS[name]
    fewer = {} if experts is None else {EXPERTS[name]: experts}
    write_config(directory, model_type, {**settings, **SMALL, **fewer, "num_hidden_layers": LAYERS[name]})
    model = build_on_meta(json.loads((directory / "config.json").read_text()), NoFiles())
    tensors = as_stored(model, {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()})
    generator, left = torch.Generator().manual_seed(0), RANDOM_BYTES
    with RowWriter(directory / "model.safetensors", tensors) as writer:
        for part, x in tensors.items():
            left -= x.nbytes
            if left > 0 or x.dim() < 2:
                writer.put(part, 0, torch.empty(x.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator))
    return sum(x.nbytes for x in tensors.values())


@click.command()
@click.option("--model", "names", type=click.Choice([*LAYERS]), multiple=True, help="[default: all]")
@click.option("--experts", type=click.IntRange(8), help="Fewer experts in a layer.  [default: the model's]")
@click.option(
    "--default", is_flag=True, help="Use the scheme's own recipe, with 2,048 tokens.  [default: plain rounding]"
)
@click.option("--scratch", type=click.Path(path_type=Path), help="Where models and artifacts lie meanwhile.")
def main(names: tuple[str, ...], experts: int | None, default: bool, scratch: Path | None) -> None:
    """Print a line for each model."""
    for name in names or LAYERS:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            model, output, ids = (Path(folder) / part for part in ("model", "out", "ids.jsonl"))
            size, start = write_model(model, name, experts), time.perf_counter()
            label = DEFAULT if default else PLAIN
            drawn = torch.randint(SMALL["vocab_size"], (TOKENS[label],), generator=torch.Generator().manual_seed(0))
            rows = drawn.split(ROW)
            ids.write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in rows))
            command = [sys.executable, "-m", "quantize", str(model), "--scheme", "W4A16", "--calibration", str(ids)]
            command += ["--output-dir", str(output), "--seqlen", str(len(rows[0])), "--quiet"]
            if not default:
                recipe = Path(folder) / "plain.toml"
                recipe.write_text(PLAIN_RECIPE)
                command += ["--recipe", str(recipe)]
            _, status, usage = os.wait4(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, 0)
            if status:
                raise click.ClickException(f"the run on {name} failed")
            peak = usage.ru_maxrss * 1024
            artifact = sum(path.stat().st_size for path in output.iterdir())
            minutes, fewer = (time.perf_counter() - start) / 60, f" with {experts} experts" if experts else ""
            click.echo(
                f"{LAYERS[name]} layers of {name}{fewer}: {human(size)} of weights become {human(artifact)} by {label} "
                f"to W4A16, at a peak of {human(peak)} and in {minutes:.0f} minutes"
            )


if __name__ == "__main__":
    main()
