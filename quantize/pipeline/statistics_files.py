"""Statistics of a part of the calibration data are kept in a file, and the files of all parts can be merged.

Each part can be collected where it lies, by a process on its own. The statistics are those of the float model, so a
recipe may have only one pass that asks for statistics, and its quantizer must ask for none: what later passes and
GPTQ see depends on the choices that all of the data led to before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.artifact.writer import translate_disk_errors
from quantize.calibration.data import BATCH_TOKENS
from quantize.calibration.statistics import Statistic
from quantize.errors import UsageError
from quantize.pipeline.context import RunContext
from quantize.pipeline.fingerprint import Fingerprint, diff_fingerprints
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.serialization import load_state, save_state
from quantize.pipeline.steps.global_statistics import statistics_before


@dataclass(frozen=True)
class StatisticsFile:
    """Statistics of one or several parts of the data.

    Attributes:
        identity: the fingerprint of the model, the recipe and the code.
        data: the hash of each part → the numbers of its rows and tokens, and the special tokens that all rows begin
            with, as in the manifest.
        step: the number of the pass in the recipe.
        statistics: the statistics of the inputs of all linears, by weight.
    """

    identity: Fingerprint
    data: Mapping[str, Mapping[str, Any]]
    step: int
    statistics: Mapping[str, Statistic]

    def record(self) -> dict[str, Any]:
        """Return the manifest's entry for the data."""
        first, *rest = self.data.values()
        sums = {name: sum(part[name] for part in self.data.values()) for name in ("rows", "tokens")}
        alike = {name: x for name, x in first.items() if all(part.get(name) == x for part in rest)}
        return {"sha256": list(self.data)} | alike | sums


def only_calibrated_step(plan: Plan) -> int:
    """Return the number of the only step whose pass asks for statistics.

    Raises:
        UsageError: there is not exactly one such pass, or something else uses the data.
    """
    recipe, asking = plan.recipe, [(n, step) for n, step in enumerate(plan.steps) if step.handler.needs]
    if plan.quantizer.needs_gram or recipe.tune or (recipe.prefix and recipe.prefix.search):
        what = "tune" if recipe.tune else "prefix" if not plan.quantizer.needs_gram else plan.quantizer.name
        raise UsageError(f'{what} needs all data in one run; for merged statistics round with {{ name = "rtn" }} alone')
    if len(asking) != 1:
        names = ", ".join(step.handler.name for _, step in asking) or "none"
        raise UsageError(f"merged statistics need exactly one pass that asks for them, and this recipe has {names}")
    return asking[0][0]


def collect(prepared: Prepared, found: Fingerprint, context: RunContext) -> StatisticsFile:
    """Collect statistics of the inputs of all linears, in front of the pass that asks for them.

    Args:
        prepared: the run.
        found: the run's fingerprint.
        context: the context of the run.

    Raises:
        UsageError: the recipe needs more than statistics that can be merged.
    """
    plan, program, samples = prepared.plan, prepared.program, prepared.samples
    number = only_calibrated_step(plan)
    batches = context.prefix.batches(samples.batches(max(1, BATCH_TOKENS // plan.recipe.seqlen)))
    weights = frozenset(linear.weight for linear in program.all_linears)
    statistics = statistics_before(number, weights, prepared.checkpoint, program, plan, batches, context, {})
    return StatisticsFile(without_data(found), {samples.sha256: samples.size_record()}, number, statistics)


def without_data(found: Fingerprint) -> Fingerprint:
    """Return the part of a fingerprint that all parts of the data share, wherever they were run."""
    return {part: hashes for part, hashes in found.items() if part not in ("data", "machine")}


def write_collected(path: Path, found: StatisticsFile) -> None:
    """Write a new file.

    Raises:
        UsageError: the file exists.
        QuantizeError: the disk is full or not writable.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; give a new file")
    temporary = path.with_name(f".{path.name}.part")
    with translate_disk_errors(path):
        save_state(temporary, {name: getattr(found, name) for name in StatisticsFile.__dataclass_fields__})
        temporary.rename(path)


def read_collected(path: Path) -> StatisticsFile:
    """Read what `write_collected` wrote.

    Raises:
        UsageError: there is no such file, or it holds no statistics.
    """
    try:
        return StatisticsFile(**load_state(path))
    except Exception as error:
        raise UsageError(f"{path} holds no statistics of --collect-stats: {error}") from error


def load_matching(path: Path, found: Fingerprint) -> StatisticsFile:
    """Read statistics and check that they belong to the same model, recipe and code.

    Raises:
        UsageError: there is no such file, or it belongs to another run.
    """
    collected = read_collected(path)
    if changed := diff_fingerprints(collected.identity, without_data(found)):
        raise UsageError(f"{' and '.join(changed)} changed since {path} was collected; collect it anew")
    return collected


def merge_stats(paths: Sequence[Path], output: Path) -> StatisticsFile:
    """Merge the statistics of parts of the data, write them, and return them.

    Raises:
        UsageError: two files are of different models or recipes, or of the same part of the data.
    """
    first, *rest = [read_collected(path) for path in paths]
    data, statistics = dict(first.data), dict(first.statistics)
    for path, other in zip(paths[1:], rest, strict=True):
        if changed := diff_fingerprints(first.identity, other.identity):
            raise UsageError(f"{' and '.join(changed)} of {path} differs from that of {paths[0]}; collect them alike")
        if data.keys() & other.data.keys():
            raise UsageError(f"{path} is of data that was merged already; give each part of the data once")
        data |= other.data
        for name, statistic in other.statistics.items():
            statistics[name].merge(statistic)
    merged = StatisticsFile(first.identity, dict(sorted(data.items())), first.step, statistics)
    write_collected(output, merged)
    return merged
