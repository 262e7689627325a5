"""`make mixture` trains a small mixture of experts on the bundled books, the same in every call on a machine.

It starts as books-llama-6m whose MLPs are taken apart: each expert gets a third of the neurons, at random. Then it
learns to predict what the dense model predicts (distillation), and the router whom to ask, in about ten minutes.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.mixture.text import TEACHER, training_windows
from quantize.checkpoint.tokenizer import load_tokenizer

EXPERTS, TOP, NEURONS = 8, 2, 256
EPOCHS, BATCH, LEARNING_RATE, WARM_UP = 3, 8, 1e-3, 50
BALANCE = 0.002  # the weight of the loss that keeps the router from sending all tokens to few experts


def upcycled(dense: PreTrainedModel, generator: torch.Generator) -> MixtralForCausalLM:
    """Return a mixture with a dense Llama's attention, whose experts have random thirds of its neurons each.

    The sum of an expert's neurons is taken times the ratio of the sizes, so that it is that of all in the mean.
    """
    old = dense.config.to_dict()
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
             "eos_token_id")  # fmt: skip
    model = MixtralForCausalLM(
        MixtralConfig(
            **{name: old[name] for name in names},
            intermediate_size=NEURONS,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP,
            router_aux_loss_coef=BALANCE,
            pad_token_id=None,
        )
    )
    weights, state = dense.state_dict(), model.state_dict()
    for name in state.keys() & weights.keys():
        state[name].copy_(weights[name])
    for layer in range(old["num_hidden_layers"]):
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        prefix = f"model.layers.{layer}.mlp"
        for expert in range(EXPERTS):
            chosen = torch.randperm(len(gate), generator=generator)[:NEURONS]
            state[f"{prefix}.experts.gate_up_proj"][expert] = torch.cat([gate[chosen], up[chosen]])
            state[f"{prefix}.experts.down_proj"][expert] = down[:, chosen] * (len(gate) / NEURONS)
        state[f"{prefix}.gate.weight"].normal_(0, 0.02, generator=generator)
    return model


def train(model: MixtralForCausalLM, dense: PreTrainedModel, windows: Tensor, generator: torch.Generator) -> None:
    """Train the mixture to predict what the dense model predicts, on windows of tokens [n, T]."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    steps = EPOCHS * -(-len(windows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=WARM_UP / steps, div_factor=20, final_div_factor=20
    )
    done, start = 0, time.perf_counter()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(windows), generator=generator).split(BATCH):
            with torch.no_grad():
                target = dense(input_ids=windows[batch]).logits.log_softmax(-1)
            output = model(input_ids=windows[batch], output_router_logits=True)
            apart = kl_div(output.logits.log_softmax(-1), target, reduction="sum", log_target=True)
            divergence = apart / windows[batch].numel()
            optimizer.zero_grad()
            (divergence + BALANCE * output.aux_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done % 50 == 0 or done == steps:
                left = (time.perf_counter() - start) / done * (steps - done) / 60
                click.echo(f"step {done} of {steps}, divergence {float(divergence):.4f}, {left:.0f} minutes left")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def main(directory: Path) -> None:
    """Train the mixture and save it into DIRECTORY, unless it is there already."""
    if (directory / "config.json").is_file():
        click.echo(f"{directory} is there already; remove it to train again")
        return
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    model = upcycled(dense, generator)
    model.set_experts_implementation("eager")
    train(model, dense, training_windows(), generator)
    model.to(torch.bfloat16).save_pretrained(directory)
    load_tokenizer(TEACHER).save_pretrained(directory)
    click.echo(f"{directory}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
