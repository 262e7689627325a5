"""What a dry run tells: what would be done, and what it would take."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.pipeline.estimate.artifact_size import stored_dtypes
from quantize.pipeline.estimate.duration import count
from quantize.pipeline.estimate.machine import measure, peak_memory
from quantize.pipeline.estimate.memory import MemoryEstimate
from quantize.pipeline.prepare import Prepared


def preflight(prepared: Prepared) -> MemoryEstimate:
    """A run that has not begun, from headers alone."""
    dtypes = stored_dtypes(prepared.checkpoint, list(prepared.program.parameters.values()))
    return MemoryEstimate(prepared.checkpoint, prepared.program, prepared.plan, prepared.samples, dtypes)


def estimates(found: MemoryEstimate, prepared: float) -> Iterator[str]:
    """Memory, disk and time, with the seconds that preparing the run has taken now and will take then."""
    held, more, machine, work = peak_memory(), found.memory_bytes(), measure(), count(found)
    yield f"memory: {human(held + more)} at its peak, {human(held)} of it held now by this process and its libraries"
    yield f"disk: {human(found.artifact_bytes())} for the artifact, {human(found.journal_bytes())} beside it meanwhile"
    yield (
        f"time: about {prepared + work.seconds(machine):.0f} s, {prepared:.0f} s of it to open and export the model as "
        f"just now, {work.multiply_adds:.1e} multiply-adds at {machine.products:.1e}/s to {machine.rounded:.1e}/s, "
        f"{work.elements:.1e} numbers in new memory at {machine.elements:.1e}/s, {work.cached:.1e} in a cache at "
        f"{machine.cached:.1e}/s, {work.operators:.1e} operators at {machine.operator:.1e} s and {work.files:.0f} "
        f"files at {machine.file:.1e} s, as measured now"
    )


def human(size: float) -> str:
    """Bytes in the unit that suits them: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
