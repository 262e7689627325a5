"""A run goes through the blocks in order: each is transformed, rounded, tuned, and handed out to be written."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from quantize.artifact.quantization_config import linear_settings
from quantize.calibration.data import BATCH_TOKENS, Row
from quantize.calibration.probes import verification_inputs
from quantize.calibration.runner import SequentialRunner
from quantize.checkpoint.tied_weights import TiedWeights
from quantize.graph.interpreter import Overrides, free_replaced
from quantize.graph.linears import Linear
from quantize.graph.program import Segment
from quantize.nn.kv_cache import check_hadamard, quantized_attention
from quantize.pipeline.block import Block, round_table
from quantize.pipeline.context import RunContext
from quantize.pipeline.held_out import HeldOutRows
from quantize.pipeline.held_out_runs import HeldOutRuns, rounded_to_nearest
from quantize.pipeline.memory import trim_heap
from quantize.pipeline.overlap import read_ahead
from quantize.pipeline.prepare import Prepared
from quantize.pipeline.run_figures import RunFigures
from quantize.pipeline.serialization import contiguous, lay_out
from quantize.pipeline.steps.global_statistics import collect_global_statistics
from quantize.pipeline.steps.round import WeightRounder
from quantize.pipeline.steps.stream_experts import ExpertFile, round_plainly, streamed
from quantize.pipeline.steps.transform import PassRunner, Surveys
from quantize.pipeline.steps.tune import BlockTuner, block_outputs
from quantize.pipeline.streams import Arriving, arrived, copies_for
from quantize.pipeline.tables import module_of
from quantize.scheme.scheme import TABLE_SCHEME

TUNE_TOKENS = 1024  # tokens in a batch of tuning


class SequentialPipeline:
    """The steps of a run, and the state that they carry from block to block.

    Attributes:
        modules: path → entry of the artifact's quantization settings.
        verification_inputs: two different inputs on which the result is verified.
        ties: the tied parameters that were stored, by all their names.
        calibration, float_reference, probes: the activations of the quantized model, of the float model if a step needs
            them, and of the quantized model on the verification inputs.
        first_batch: the number of this rank's first batch among those of all ranks.
        rows: the number of calibration rows that run together at first, and `halved`: the blocks before which half as
            many were left.
    """

    def __init__(
        self, prepared: Prepared, context: RunContext, surveys: Surveys | None = None, calibrate: bool = True
    ) -> None:
        """Collect the statistics of the whole model that passes ask for, unless they are given.

        Without `calibrate` no calibration data runs, because the given statistics are all that the recipe needs.
        """
        self.checkpoint, self.program, self.plan = prepared.checkpoint, prepared.program, prepared.plan
        self.context, samples, recipe = context, prepared.samples, prepared.plan.recipe
        batch_tokens = TUNE_TOKENS if recipe.tune else BATCH_TOKENS
        runs = self.plan.calibrates and calibrate
        given = samples.batches(self.program.batch or max(1, batch_tokens // recipe.seqlen)) if runs else []
        self.first_batch = context.ranks.shard_slice(len(given)).start
        batches = context.prefix.batches(context.ranks.shard(given))
        self.verification_inputs = verification_inputs(samples, self.program.vocabulary, context.seed)
        needs_reference = self.plan.quantizer.needs_float_reference or recipe.tune is not None
        where = (context.scratch, context.placement.activation_bytes)
        self.calibration = SequentialRunner(self.program, batches, *where)
        self.float_reference = SequentialRunner(self.program, batches if needs_reference else [], *where)
        self.rows, self.halved = max(map(rows_of, given), default=0), list[str]()
        self.rows = min(self.rows, 1) if context.prefix.tokens else self.rows
        self.copies = copies_for(context.device)
        self.probes = SequentialRunner(self.program, self.prefixed_probes())
        held_out = prepared.held_out if runs else HeldOutRows()
        self.held_out = HeldOutRuns(self.program, held_out, context.prefix, context.scratch)
        if surveys is None and any(step.surveyed for step in self.plan.steps):
            surveys = context.cached(
                "survey",
                lambda: collect_global_statistics(self.checkpoint, self.program, self.plan, batches, context),
            )
        self.pass_runner = PassRunner(
            self.program, self.plan, context, self.calibration, self.probes, surveys or {}, self.held_out
        )
        self.rounder = WeightRounder(
            self.program, self.plan, context, self.calibration, self.float_reference, self.held_out
        )
        self.modules: dict[str, dict[str, object]] = {}
        self.ties = TiedWeights(self.program.ties)

    def read(self, segment: Segment) -> dict[str, Arriving]:
        """Read a block's weights as they are stored and send them to the device, but for experts too large for that.

        A thread may do so while the block before it is at work.
        """
        apart = {linear.weight for linear in self._large(segment)}
        return {
            name: self.copies.to_device(self.checkpoint.compact_tensor(name))
            for name in segment.parameters
            if name not in apart
        }

    def arriving(self, segments: Iterable[Segment]) -> Generator[dict[str, Arriving]]:
        """Yield what `read` returns for each block, ahead if the placement says so and if files need not be fetched."""
        ahead = self.context.placement.reads_ahead and self.checkpoint.remote is None
        yield from read_ahead(segments, self.read) if ahead else map(self.read, segments)

    def _large(self, segment: Segment) -> Sequence[Linear]:
        return streamed(self.checkpoint, self.program, segment, self.plan) if self.context.ranks.count == 1 else []

    def process(
        self, segment: Segment, arriving: dict[str, Arriving], file: Path
    ) -> tuple[dict[str, Arriving], dict[str, str]]:
        """Transform and quantize one block.

        Args:
            segment: the block.
            arriving: its weights, as `read` returned them, which are taken out of it.
            file: where experts are written that are too large for memory.

        Returns:
            The tensors to store, and what was stored in the file already: its tensors by name, each with the file's.
        """
        trim_heap()
        self._halve_before(segment)
        with tempfile.TemporaryDirectory(dir=self.context.scratch) as scratch:
            return self._process(segment, self._large(segment), file, Path(scratch), arriving)

    def _process(
        self,
        segment: Segment,
        large: Sequence[Linear],
        file: Path,
        scratch: Path,
        arriving: dict[str, Arriving],
    ) -> tuple[dict[str, Arriving], dict[str, str]]:
        """Do what `process` does, with experts that are `large` by files, of which some last until this returns."""
        read = (self.checkpoint, self.program, segment, self.plan.schemes, self.context.device)
        given = Block.read(*read, large, arriving)
        plain = self._plain_rounding(given, scratch / file.name) if self.held_out.given.rows else Overrides({})
        block = self.pass_runner.apply(given)
        tables = {name: self.program.word_tables.get(name, []) for name in self.plan.tables}
        replaced = block.replaced | tables.keys()
        changed = [n for n, W in block.weights.items() if n not in replaced and W is not given.weights[n]]
        same = [n for n in block.weights if n not in replaced and n not in changed]
        del given
        needed = self.float_reference.values or self.held_out.given.rows
        reference = block.overrides() if needed else Overrides({})
        block = self._with_kv_cache(block.with_stored(changed)).with_tables(tables)
        tensors = {name: block.weights[name].to(block.dtypes[name]).cpu() for name in changed}
        written = dict[str, str]()
        if block.apart:
            with ExpertFile(file, block, self.checkpoint) as stream:
                block = self._round(block, reference, stream)
            written = dict.fromkeys(stream.names, file.name)
        else:
            block = self._round(block, reference)
        self.probes.run(segment.nodes, block.overrides())
        self.held_out.run(segment, reference, plain, block.overrides())
        self.held_out.note_block(segment, self.pass_runner.undone)
        del reference, plain
        self._make_contiguous()
        for linear, module in block.quantized.items():
            self.modules[linear.path] = linear_settings(module, self.plan.default_scheme)
            self.ties.mark_replaced(linear.weight)
        for name in block.tables:
            self.ties.mark_replaced(name)
        tensors |= {name: self.checkpoint.tensor(name) for name in same}  # read again, so that they are not held twice
        first = {name: tensor for name, tensor in tensors.items() if self.program.first_readers[name] is segment}
        kept = {name: arrived(x) for name, x in self.ties.deduplicate(first).items()}
        return {name: self.copies.to_cpu(x) for name, x in block.tensors().items()} | kept, written

    def _halve_before(self, segment: Segment) -> None:
        """Run half as many calibration rows together from a block on, if the placement says so."""
        if segment.name in self.context.placement.halved and segment.name not in self.halved and self.halve():
            self.halved.append(segment.name)

    def halve(self) -> bool:
        """Run half as many calibration rows together from now on; return whether that can be."""
        runners = (self.calibration, self.float_reference)
        return self.calibration.halves and all(runner.halve() for runner in runners)

    def _plain_rounding(self, block: Block, file: Path) -> Overrides:
        """Return what the block runs with by plain rounding, without float weights that it does not read.

        Experts that the block does not hold are rounded into a file.
        """
        rounded = rounded_to_nearest(block)
        if block.apart:
            filed = round_plainly(block, self.checkpoint, file)
            rounded = replace(rounded, quantized={**rounded.quantized, **filed})
        state = rounded.overrides()
        state = replace(state, weights=dict(state.weights))
        free_replaced(self.program, state, block.replaced)
        return state

    def _round(self, block: Block, reference: Overrides, file: ExpertFile | None = None) -> Block:
        """Round the block, tune it if the recipe says so, and advance the calibration activations through it."""
        finish, tune = self.calibrates_after(block.segment), self.plan.recipe.tune
        if tune is None or all(scheme == TABLE_SCHEME for scheme in block.schemes.values()):
            return self.rounder.apply(block, reference, finish, keep=False, file=file)
        starts = list(self.calibration.values)
        block = self.rounder.apply(block, reference, finish, keep=True)
        targets = [block_outputs(values, block.segment) for values in self.float_reference.values]
        tuner = BlockTuner(self.program, self.context, tune)
        block = tuner.keep_nearer(block, tuner.apply(block, starts, targets), self.held_out, reference)
        for number, values in enumerate(starts):
            self.calibration.values[number] = values
        state = replace(block.overrides(), product_dtype=block.product_dtype)
        self.calibration.run(block.segment.nodes if finish else (), state)
        return block

    def _make_contiguous(self) -> None:
        """Lay out the carried state as a run that is resumed after this block has it."""
        for _, runner, _ in self.runners():
            lay_out(runner)
        sites = self.pass_runner.sites
        self.pass_runner.sites = [{basis: contiguous(found) for basis, found in made.items()} for made in sites]

    def _with_kv_cache(self, block: Block) -> Block:
        """Return the block with keys and values rounded as in a quantized cache, if the recipe has one."""
        args = self.plan.recipe.kv_cache
        operators = quantized_attention(block.segment, args)
        if args is not None and args.hadamard and operators:
            found = check_hadamard(self.program, block.segment, block.overrides(), self.probes.values)
            self.pass_runner.differences.setdefault("kv_cache", {})[block.segment.name] = found
        return replace(block, operators=operators)

    def calibrates_after(self, segment: Segment) -> bool:
        """Return whether anything after a block uses the calibration activations."""
        return self.plan.calibrates_after(segment, self.program)

    def unquantized_tensors(self) -> dict[str, Tensor]:
        """Return the buffers, and the parameters that the forward pass never reads, as they are stored."""
        read = {name for segment in self.program.segments for name in segment.parameters}
        unread = {name: self.checkpoint.tensor(name) for name in self.program.parameters.values() if name not in read}
        tables = {name: round_table(unread.pop(name)).tensors() for name in self.plan.tables if name in unread}
        stored = {f"{module_of(name)}.{part}": x for name, table in tables.items() for part, x in table.items()}
        return self.ties.deduplicate(unread) | stored | self.checkpoint.buffers()

    def prefixed_probes(self) -> list[dict[str, Tensor]]:
        """Return the verification inputs with the prefix in front, as they run."""
        return self.context.prefix.batches(self.verification_inputs)

    def runners(self) -> Iterator[tuple[str, SequentialRunner, int]]:
        """Yield each runner with its name and the number of its first batch among those of all ranks."""
        yield "calibration", self.calibration, self.first_batch
        yield "float_reference", self.float_reference, self.first_batch
        yield "probes", self.probes, 0
        for name, runner in self.held_out.runners().items():
            yield name, runner, 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a run carries from block to block besides activations, as plain data and tensors."""
        passes = self.pass_runner
        return {
            "modules": self.modules,
            "untied": self.ties.untied,
            "tied": self.ties.stored,
            "left_out": self.ties.left_out,
            "sites": [{basis.index: found for basis, found in made.items()} for made in passes.sites],
            "differences": passes.differences,
            "changed": passes.changed,
            "held_out": [
                self.held_out.scores,
                self.held_out.rounded_plainly,
                self.held_out.not_tuned,
                self.held_out.rounded_without_data,
                vars(self.held_out.figures),
            ],
            "expert_tokens": self.rounder.expert_tokens,
            "kept": self.rounder.kept,
            "halved": self.halved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        passes = self.pass_runner
        self.halved = [name for name in state["halved"] if self.halve()]
        self.modules, self.ties.untied, self.ties.stored = state["modules"], state["untied"], state["tied"]
        self.ties.left_out = state["left_out"]
        judged = self.held_out
        judged.scores, judged.rounded_plainly, judged.not_tuned, judged.rounded_without_data, figures = state[
            "held_out"
        ]
        judged.figures = RunFigures(**figures)
        self.rounder.expert_tokens.update(state["expert_tokens"])
        self.rounder.kept.extend(state["kept"])
        passes.differences, passes.changed = state["differences"], state["changed"]
        for step, made, sites in zip(self.plan.steps, state["sites"], passes.sites, strict=True):
            bases = {basis.index: basis for basis in step.sites}
            sites.update({bases[index]: found for index, found in made.items()})


def rows_of(batch: Row) -> int:
    """Return the number of calibration rows of a batch."""
    return len(next(iter(batch.values())))
