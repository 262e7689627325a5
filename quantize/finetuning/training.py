"""The training loop of a fine-tune takes the task loss and the kurtosis penalty on windows drawn at random."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from quantize.errors import QuantizeError
from quantize.finetuning.regularized_linear import Backward, RegularizedLinear
from quantize.graph.export import forward_switches
from quantize.pipeline.progress import track
from quantize.scheme.scheme import Data
from quantize.transforms.kurtosis import kurtosis

MAX_NORM = 1.0  # the largest norm of the gradient, because a rounded input can cross many levels at once


class FinetuneSettings(Data):
    """The settings of a fine-tune; see `quantize.finetune`."""

    distill: bool
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    seqlen: int = Field(ge=2)
    num_bits: int = Field(ge=2, le=8)
    kurtosis: float = Field(ge=0, allow_inf_nan=False)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    quantized_backward: Backward
    seed: int = Field(ge=0)


class Batches:
    """Batches of windows, [batch_size, seqlen] each, that start anywhere in a stream of tokens."""

    def __init__(self, stream: Tensor, settings: FinetuneSettings) -> None:
        self.stream, self.settings = stream, settings
        self.generator = torch.Generator().manual_seed(settings.seed)

    def draw(self) -> Tensor:
        """Draw the next batch."""
        length = self.settings.seqlen
        starts = len(self.stream) - length + 1
        first = torch.randint(starts, (self.settings.batch_size, 1), generator=self.generator)
        return self.stream[first + torch.arange(length)]


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    linears: Sequence[RegularizedLinear],
    batches: Batches,
    settings: FinetuneSettings,
    console: Console | None,
) -> tuple[float, ...]:
    """Train all parameters of a model and the clips of its linears, in place.

    Args:
        model: a model that returns `logits` [B, T, V].
        teacher: the model whose distribution is learned; None learns the text.
        linears: the regularized linears in the model.
        batches, settings, console: as in `quantize.finetune`.

    Returns:
        The task loss of each step.

    Raises:
        QuantizeError: a gradient is not finite.
    """
    clips = {id(linear.clip) for linear in linears}
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in clips]
    with torch.no_grad():
        predicted(model, batches.draw())  # the first run sets the clips
    optimizer = make_optimizer(parameters, linears, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    losses: list[float] = []
    for step in track(range(settings.steps), "fine-tuning", lambda _: f"loss {last(losses)}", console):
        optimizer.zero_grad()
        losses.append(backward(model, teacher, linears, batches.draw(), settings.kurtosis))
        if not bool(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM).isfinite()):
            raise QuantizeError(f"the gradient of step {step} is not finite; give a smaller learning_rate")
        optimizer.step()
        schedule.step()
    return tuple(losses)


def last(losses: Sequence[float]) -> str:
    """Say the latest loss in words."""
    return f"{losses[-1]:.4f}" if losses else "not known yet"


def make_optimizer(
    parameters: list[nn.Parameter], linears: Sequence[RegularizedLinear], settings: FinetuneSettings
) -> torch.optim.Adam:
    """Make Adam, which moves a number by the learning rate whatever its gradient, and a clip by a part of its range."""
    clips: list[dict[str, Any]] = [
        {"params": [linear.clip], "lr": settings.learning_rate * float(linear.clip.detach().abs().max())}
        for linear in linears
    ]
    return torch.optim.Adam([{"params": parameters}, *clips], lr=settings.learning_rate)


def backward(
    model: nn.Module, teacher: nn.Module | None, linears: Sequence[RegularizedLinear], ids: Tensor, lambda_: float
) -> float:
    """Leave the gradients of task + λ Σ Kurt in the parameters, and return the task loss."""
    for linear in linears:
        linear.output_kurtosis.clear()
    task = task_loss(model, teacher, ids)
    penalty = [kurtosis for linear in linears for kurtosis in linear.output_kurtosis]
    total = task + lambda_ * torch.stack(penalty).sum() if lambda_ else task
    total.backward()
    return float(task.detach())


def task_loss(model: nn.Module, teacher: nn.Module | None, ids: Tensor) -> Tensor:
    """Return the loss in nats per predicted token: the cross-entropy of the text, or KL(teacher ‖ model)."""
    logits = predicted(model, ids)
    if teacher is None:
        return cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        log_p = log_softmax(predicted(teacher, ids), -1)
    return kl_div(log_softmax(logits, -1), log_p, reduction="batchmean", log_target=True)


def predicted(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits that predict each token but a window's first, [tokens, V]."""
    logits: Tensor = model(input_ids=ids, **forward_switches(model)).logits
    return logits[:, :-1].flatten(0, 1)


@torch.no_grad()
def mean_kurtosis(model: nn.Module, paths: Sequence[str], ids: Tensor) -> dict[str, float]:
    """Return the mean kurtosis of the outputs of some modules; NaN for one that does not run."""
    noted: dict[str, list[Tensor]] = defaultdict(list)
    with contextlib.ExitStack() as hooks:
        for path in paths:

            def note(module: nn.Module, args: object, y: Tensor, path: str = path) -> None:
                del module, args
                noted[path].append(kurtosis(y).flatten())

            hooks.enter_context(model.get_submodule(path).register_forward_hook(note))
        predicted(model, ids)
    return {path: float(torch.cat(noted[path]).mean()) if noted[path] else float("nan") for path in paths}
