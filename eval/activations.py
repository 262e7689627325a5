"""Massive activations of a float model, block by block, as flat data and as a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from quantize.calibration.massive import Activation, HiddenStateStats, hidden_states
from quantize.calibration.runner import SequentialRunner
from quantize.calibration.tensor_samples import read_calibration
from quantize.checkpoint.checkpoint import Checkpoint
from quantize.checkpoint.tokenizer import load_tokenize
from quantize.checkpoint.weight_checks import check_weights
from quantize.errors import UsageError
from quantize.graph.inputs import example_inputs
from quantize.graph.interpreter import Overrides
from quantize.graph.program import Program

SEQUENCES, TOKENS = 10, 512  # as in arXiv 2402.17762, section 2; fewer tokens where the model has fewer positions
MOST = 4  # flagged activations that a line names


def measure(checkpoint: Checkpoint, program: Program, calibration: Path | None) -> list[dict[str, Any]]:
    """Measure the hidden states behind each block of a float model, with one block's weights in memory at a time.

    Args:
        checkpoint: the model, which takes token ids alone.
        program: its graph.
        calibration: as for quantizing; None takes the bundled prose.

    Raises:
        UsageError: the model cannot be exported or takes something else. What `read_calibration` raises is raised, too.
    """
    skeleton = checkpoint.skeleton()
    check_weights(checkpoint, {name: p.shape for name, p in skeleton.named_parameters()})
    inputs = example_inputs(skeleton)
    if program.export_error or len(inputs) > 1 or any(found.example.is_floating_point() for found in inputs.values()):
        raise UsageError(
            "--activations needs a model that can be exported and takes only token ids, and this model is none"
        )
    length = min(TOKENS, checkpoint.config.get("max_position_embeddings") or TOKENS)
    tokenize = load_tokenize(checkpoint.directory)
    samples = read_calibration(calibration, inputs, length, SEQUENCES, tokenize, program.vocabulary)
    ids = [next(iter(batch.values())) for batch in samples.batches(SEQUENCES)]
    return [as_dict(hidden) for hidden in collect_hidden_states(checkpoint, program, ids)]


def collect_hidden_states(checkpoint: Checkpoint, program: Program, batches: list[Tensor]) -> list[HiddenStateStats]:
    """Yield the hidden states behind each block on token ids [B, T]."""
    runner, found = SequentialRunner(program, batches), list[HiddenStateStats]()
    for segment in program.segments:
        weights = {name: checkpoint.tensor(name).float() for name in segment.parameters}
        runner.run(segment.nodes, Overrides(weights))
        for node in hidden_states(program, segment):
            found.append(HiddenStateStats(segment.name))
            for values, ids in zip(runner.values, batches, strict=True):
                found[-1].update(values[node], ids)
    return found


def as_dict(hidden: HiddenStateStats) -> dict[str, Any]:
    """Return plain data for JSON: the largest activations, and those each rule flags (`calibration/massive.py`)."""
    listed = sorted(hidden.large.values(), key=lambda item: -item[0].value)
    return {
        "block": hidden.name,
        "median": hidden.median,
        "top": [asdict(a) for a in hidden.top],
        "massive": [place(a, count) for a, count in listed if a.massive],
        "large": [place(a, count) for a, count in listed],
        "tokens": [{"token": token, "count": count} for token, count in hidden.tokens.most_common()],
        "small": [{"token": token, "count": count} for token, count in hidden.small.most_common()],
    }


def place(largest: Activation, count: int) -> dict[str, Any]:
    """Return the largest activation of a token id and channel, and the number of `large` ones there."""
    return asdict(largest) | {"count": count}


def activations_table(found: list[dict[str, Any]]) -> Table:
    """Return a table with one row for each block."""
    table = Table("block", "median")
    table.add_column("largest |h|, × median,\ntoken @ position, channel", no_wrap=True)
    table.add_column("flagged: token,\nchannel (how often)", overflow="fold")
    for block in found:
        top = [
            f"{a['value']:.1f}, {a['ratio']:,.0f} ×, {a['token']} @ {a['position']}, {a['channel']}"
            for a in block["top"]
        ]
        flags = [
            *listed("massive: ", [f"{a['token']}, {a['channel']} ({a['count']})" for a in block["massive"]]),
            *listed("≥ 1000 ×: ", [f"{a['token']}, {a['channel']} ({a['count']})" for a in block["large"]]),
            *listed("R > 64: ", [f"{a['token']} ({a['count']})" for a in block["tokens"]]),
            *listed("R < 1/8: ", [f"{a['token']} ({a['count']})" for a in block["small"]]),
        ]
        table.add_row(block["block"], f"{block['median']:.3g}", "\n".join(top), "\n".join(flags), end_section=True)
    return table


def listed(rule: str, found: list[str]) -> list[str]:
    """Return one line with the first activations that a rule flags and the number of others; none if there are none."""
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return [rule + "; ".join(found[:MOST]) + more] if found else []
