"""What the rows that were held back say about a run: a record for the manifest, and sentences for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantize.calibration.data import Samples
from quantize.graph.program import Program
from quantize.pipeline.held_out import FEW_DIFFERENT, different_tokens
from quantize.pipeline.held_out_runs import HeldOutRuns

ROWS_PER_COLUMN = 2  # calibration tokens for each input channel below which they are called few


def held_out_record(runs: HeldOutRuns, samples: Samples, rounds: bool) -> dict[str, Any]:
    """Return the scores, the data they are of, and a warning if plain rounding loses no more; {} without rows.

    There is no warning if the run `rounds` no weight anew.
    """
    if not runs.scores:
        return {}
    tokens = sum(min(x.numel(), runs.length) for row in runs.given.rows for x in row.values() if x.dim() == 1)
    kept = {"rounded_plainly": runs.rounded_plainly, "not_tuned": runs.not_tuned}
    record: dict[str, Any] = {name: found for name, found in kept.items() if found}
    record |= runs.scores
    record |= {"source": runs.given.source, "rows": len(runs.given.rows), "tokens": tokens}
    found, plain = (runs.scores[name] for name in ("quantized", "plain_rounding"))
    measure = "kl" if "kl" in found else "error"
    if found[measure] < plain[measure] or not rounds:
        return record | {"warning": ""}
    return record | {
        "warning": f"plain rounding is as near to the float model or nearer: {reason(runs.program, samples)}"
    }


def reason(program: Program, samples: Samples) -> str:
    """Return the likely reason why calibrated rounding gains nothing."""
    different = different_tokens(samples)
    columns = max(linear.columns for linear in program.all_linears)
    if different is not None and samples.tokens < ROWS_PER_COLUMN * columns:
        return f"{samples.tokens} calibration tokens are few for {columns} input channels; raise --nsamples or --seqlen"
    if different is not None and different < FEW_DIFFERENT:
        return f"the calibration data has only {different} different tokens; give running text like that in use"
    return "the calibration data may be unlike these rows, or the recipe does not suit this model; try another of both"


def unseen_experts(tokens: Mapping[str, Sequence[int]]) -> str:
    """Return a warning if more than a tenth of the experts saw no calibration token; else ''.

    Args:
        tokens: how many tokens each expert saw, by the path of the experts.
    """
    seen = [count for counts in tokens.values() for count in counts]
    if 10 * seen.count(0) <= len(seen):
        return ""
    return (
        f"{seen.count(0)} of {len(seen)} stacked experts saw no calibration token and were rounded to nearest; "
        "raise --nsamples or --seqlen, or give the recipe `calibrate_all_experts = true`"
    )


def sentence(record: Mapping[str, Any]) -> str:
    """Return the scores in one line for the console."""
    plain, found = record["plain_rounding"], record["quantized"]
    where = f"on {record['tokens']:,} tokens" if record["tokens"] else f"on {record['rows']} samples"
    where += f" of the {record['source']} that the run did not see"
    if "loss" in found:
        return (
            f"{where}: loss {record['float']['loss']:.4f} in floating point, {plain['loss']:.4f} by plain rounding, "
            f"{found['loss']:.4f} as quantized (KL {plain['kl']:.4f} and {found['kl']:.4f})"
        )
    if "kl" in found:
        return f"{where}: KL {plain['kl']:.4f} by plain rounding, {found['kl']:.4f} as quantized"
    return f"{where}: relative error {plain['error']:.4f} by plain rounding, {found['error']:.4f} as quantized"


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Return why a result may not be worth its calibration, in sentences."""
    found = [str(warning)] if (warning := manifest.get("held_out", {}).get("warning")) else []
    if paths := manifest.get("rounded_without_data"):
        found.append(
            f"no calibration row reached {', '.join(paths)}, so plain rounding was all that could be done there; give "
            "data that reaches them, or leave them out with --ignore"
        )
    return found
