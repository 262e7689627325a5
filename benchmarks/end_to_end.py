"""`python -m benchmarks.end_to_end MODEL ARTIFACT` tunes a whole quantized language model by KL to the float model.

Blocks are tuned one by one elsewhere (`tune` in a recipe). What is left to gain from all at once is measured here: of
the scales alone, as EfficientQAT's second phase trains them (arXiv 2407.11062, section 3.3, there by cross-entropy), of
the integers alone, straight-through, of both, and of the choice between each integer and its two neighbours, which is
soft at first and hard in the end, as in GSQ (arXiv 2604.18556). The artifact stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from benchmarks.models.bench import TEXT
from benchmarks.models.windows import WINDOW, WINDOWS
from quantize.artifact.load import load
from quantize.calibration.data import BUNDLED, read_samples
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.eval.divergence import LanguageJudge
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.steps.tune import CELL, STELinear, fake_linear

SEQLEN, BATCH = 128, 4  # tokens of a row, and rows of a step
LEARNING_RATE = {"scales": 1e-3, "integers": 0.005, "choices": 0.1}  # in parts of a scale, steps, and logits
TUNED = {"scales": ("scales",), "integers": ("integers",), "both": ("scales", "integers"), "choices": ("choices",)}
RELUCTANCE = 4.0  # by which the logit of an integer is larger than those of its neighbours at first
TEMPERATURES = 1.0, 0.05  # of the softmax at the first and the last step


class TunedLinear(STELinear):
    """A quantized linear whose integers and scales are learned.

    Where in its cell a weight lay an artifact does not say, so each starts at a random place of it.

    Attributes:
        stretch: what each scale has grown by, as a part of it, [N, groups].
        choice: the logits of a value that is a step lower, as it is, or a step higher, [N, K, 3].
        temperature: of the softmax over them; 0 takes the likeliest.
    """

    temperature = 0.0

    def __init__(self, done: QuantizedLinear, generator: torch.Generator) -> None:
        super().__init__(done, done.qtensor().dequantize().float())
        self.u.data += CELL * (2 * torch.rand(self.u.shape, generator=generator) - 1)
        self.linear, groups = done, done.qtensor().unpack_scale().shape[1]
        self.stretch = nn.Parameter(torch.zeros(done.out_features, groups))
        logits = torch.tensor([-RELUCTANCE, 0, -RELUCTANCE]).expand(*self.u.shape, 3)
        self.choice, self.generator = nn.Parameter(logits.clone()), generator

    def chosen(self) -> Tensor:
        """Return values of the format [N, K]; while the choice is soft, means of three neighbours with Gumbel noise."""
        values, args = super().values().detach(), self.done.scheme.weights
        near = values[..., None] + self.number_format.step * torch.tensor([-1.0, 0.0, 1.0])
        near = self.number_format.round(near, args)
        if not self.temperature:
            return near.gather(-1, self.choice.argmax(-1, keepdim=True))[..., 0]
        noise = -torch.empty_like(self.choice).exponential_(generator=self.generator).log()
        return (near * ((self.choice + noise) / self.temperature).softmax(-1)).sum(-1)

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Map [..., K] to [..., N] in fake quantization."""
        del offs
        stretch = self.stretch.repeat_interleave(self.linear.in_features // self.stretch.shape[1], dim=1)
        values = self.chosen() if self.choice.requires_grad else self.values()
        return fake_linear(self.linear, x, (values - self.zero_point) * self.scale * (1 + stretch))


def tunable(artifact: Path) -> tuple[nn.Module, dict[str, list[nn.Parameter]]]:
    """Load an artifact with what can be tuned, by the name of what it is."""
    model = load(artifact).requires_grad_(False)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    generator = torch.Generator().manual_seed(0)
    tuned = {path: TunedLinear(linear, generator) for path, linear in linears.items()}
    for path, linear in tuned.items():
        model.set_submodule(path, linear)
    found = [(x.stretch, x.u, x.choice) for x in tuned.values()]
    for parameter in (x for each in found for x in each):
        parameter.requires_grad_(False)
    return model, dict(zip(LEARNING_RATE, map(list, zip(*found, strict=True)), strict=True))


def batches(model: Path, steps: int) -> Iterator[Tensor]:
    """Yield ids [BATCH, SEQLEN] of the bundled prose, from a seeded place each."""
    samples = read_samples(BUNDLED, SEQLEN, 2**31, load_tokenize(model), 2**31)
    rows, generator = torch.cat([x["input_ids"] for x in samples.batches(1)]), torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (BATCH,), generator=generator)]


def tune(model: nn.Module, reference: nn.Module, given: dict[str, list[nn.Parameter]], rows: list[Tensor]) -> None:
    """Lower KL(float model ‖ model) on each batch in turn, by Adam with a cosine."""
    for parameter in (x for each in given.values() for x in each):
        parameter.requires_grad_(True)
    adam = torch.optim.Adam([{"params": given[name], "lr": LEARNING_RATE[name]} for name in given])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(rows))
    linears = [module for module in model.modules() if isinstance(module, TunedLinear)]
    first, last = TEMPERATURES
    for step, ids in enumerate(rows):
        for linear in linears:
            linear.temperature = first * (last / first) ** (step / len(rows))
        with torch.no_grad():
            p = reference(input_ids=ids).logits.float().log_softmax(-1)
        q = model(input_ids=ids).logits.float().log_softmax(-1)
        adam.zero_grad()
        (kl_div(q, p, log_target=True, reduction="sum") / ids.numel()).backward()
        adam.step()
        schedule.step()
    for linear in linears:
        linear.temperature = 0.0


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default=100, show_default=True)
@click.option("--tune", "chosen", type=click.Choice(list(TUNED)), multiple=True, help="[default: all]")
def main(model: Path, artifact: Path, steps: int, chosen: tuple[str, ...]) -> None:
    """Print the loss and the KL before and after, on unseen text, for what is tuned."""
    judge, rows = LanguageJudge(model, TEXT, WINDOW, WINDOWS), list(batches(model, steps))
    for what in ("nothing", *(chosen or TUNED)):
        names = TUNED.get(what, ())
        student, parameters = tunable(artifact)
        start = time.process_time()
        if names:
            tune(student, judge.reference, {name: parameters[name] for name in names}, rows)
        minutes, found = (time.process_time() - start) / 60, judge.scores(student)
        told = f"{what} tuned: loss {found['increase']:+.4f}, KL {found['kl']:.4f}"
        click.echo(f"{told}, {minutes:.1f} CPU minutes")


if __name__ == "__main__":
    main()
