"""What measuring needs besides is looked for before anything slow is imported."""

from __future__ import annotations

from importlib.util import find_spec

from quantize.errors import UsageError


def require_lm_eval() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        UsageError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("--tasks needs lm-evaluation-harness; install it with pip install 'quantize-model[eval]'")
