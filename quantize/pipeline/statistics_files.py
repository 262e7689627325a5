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

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from quantize.artifact.writer import remove, translate_disk_errors
from quantize.calibration.data import BATCH_TOKENS
from quantize.calibration.statistics import Absmax, Gram, Rows, Statistic
from quantize.errors import UsageError, reason, shown
from quantize.pipeline.context import RunContext
from quantize.pipeline.fingerprint import Fingerprint, diff_fingerprints
from quantize.pipeline.plan import Plan
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.serialization import load_state, save_state
from quantize.pipeline.steps.global_statistics import statistics_before
from quantize.recipe.validation import validated


class PartOfData(BaseModel):
    """How much data a part was, and the part of its file and the special tokens, if the manifest names them."""

    model_config = ConfigDict(extra="forbid", strict=True)
    rows: NonNegativeInt
    tokens: NonNegativeInt
    leading_tokens: list[NonNegativeInt] | None = None
    bytes_read: NonNegativeInt | None = None
    bytes_in_file: NonNegativeInt | None = None


class Description(BaseModel):
    """What a file says of its statistics; the attributes are those of `StatisticsFile`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    identity: dict[str, dict[str, str]]
    data: dict[str, PartOfData] = Field(min_length=1)
    step: NonNegativeInt
    statistics: dict[str, Any] = Field(min_length=1)


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
    batches = context.prefix.batches(samples.batches(program.batch or max(1, BATCH_TOKENS // plan.recipe.seqlen)))
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
    check_statistics(path, found.statistics)
    temporary = path.with_name(f".{path.name}.part")
    with translate_disk_errors(path):
        try:
            save_state(temporary, {name: getattr(found, name) for name in StatisticsFile.__dataclass_fields__})
            temporary.rename(path)
        finally:
            remove(temporary)  # whatever ended it, Ctrl-C as well


def read_collected(path: Path) -> StatisticsFile:
    """Read what `write_collected` wrote, and check all of it.

    Raises:
        UsageError: there is no such file, or it holds no statistics, or numbers that cannot have been seen.
    """
    try:
        state = load_state(path)
    except Exception as error:  # whatever a file of another program leads to
        raise UsageError(f"{path} holds no statistics of --collect-stats: {reason(error)}") from error
    validated(lambda: Description.model_validate(state), str(path))
    found = StatisticsFile(**state)
    check_statistics(path, found.statistics)
    return found


def check_statistics(path: Path, statistics: Mapping[str, Any]) -> None:
    """Check that all statistics are of one kind, and that their numbers can have been seen.

    Raises:
        UsageError: they are not; the message names the tensor and the value.
    """
    kind = type(next(iter(statistics.values())))
    for name, statistic in statistics.items():
        if not isinstance(statistic, Absmax | Gram | Rows) or type(statistic) is not kind:
            raise UsageError(f"{path}: {shown(name)} is {shown(statistic)}, no statistic like the others")
        try:
            statistic.check()
        except ValueError as error:
            raise UsageError(f"{path}: of {shown(name)} {error}; collect the statistics anew") from None


def load_matching(path: Path, prepared: Prepared, found: Fingerprint) -> StatisticsFile:
    """Read statistics and check that they belong to the same model, recipe and code.

    Raises:
        UsageError: there is no such file, or it belongs to another run.
    """
    collected = read_collected(path)
    if changed := diff_fingerprints(collected.identity, without_data(found)):
        raise UsageError(f"{' and '.join(changed)} changed since {path} was collected; collect it anew")
    number, columns = only_calibrated_step(prepared.plan), {x.weight: x.columns for x in prepared.program.all_linears}
    kind = prepared.plan.steps[number].handler.needs
    for name, statistic in collected.statistics.items():
        if type(statistic) is not kind or statistic.check() not in (None, columns.get(name)):
            raise UsageError(f"{path}: the statistics of {shown(name)} are not those of this model; collect them anew")
    if columns.keys() != collected.statistics.keys() or collected.step != number:
        raise UsageError(f"{path} holds statistics of other linears or for another pass; collect them anew")
    return collected


def fit(first: StatisticsFile, other: StatisticsFile) -> bool:
    """Return whether two files hold statistics of the same tensors, which one of them may not have seen."""
    if first.step != other.step or first.statistics.keys() != other.statistics.keys():
        return False
    pairs = ((first.statistics[name], other.statistics[name]) for name in first.statistics)
    return all(type(a) is type(b) and len({a.check(), b.check()} - {None}) < 2 for a, b in pairs)


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
        if not fit(first, other):
            raise UsageError(f"{path} holds statistics of other tensors than {paths[0]}; collect them alike")
        data |= other.data
        for name, statistic in other.statistics.items():
            statistics[name].merge(statistic)
    merged = StatisticsFile(first.identity, dict(sorted(data.items())), first.step, statistics)
    write_collected(output, merged)
    return merged
