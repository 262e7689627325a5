"""What a target cannot execute is refused before the run."""

from __future__ import annotations

import importlib

from quantize.errors import UsageError
from quantize.pipeline.estimate.report import preflight
from quantize.pipeline.prepare import Prepared


def check_target(target: str, prepared: Prepared) -> None:
    """Check that the artifact of a run can be exported to what a runtime loads.

    The exporters stand above this layer and are found by name, as passes are.

    Raises:
        UsageError: it cannot; the message names all that is in the way, and what to change.
    """
    targets = importlib.import_module("quantize.export.targets")
    if why := targets.refusal(target, preflight(prepared)):
        raise UsageError(f"{target} cannot execute the result: {why}")
