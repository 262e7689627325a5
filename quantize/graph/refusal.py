"""What torch's exporter says of a model becomes a clause of a sentence; `--verbose` shows its own words."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from types import FrameType

from torch import nn

OTHERS = ("torch", "quantize")  # packages whose modules are not the model's own code
KINDS = {  # what stands in the exporter's message or in the name of its error → what it means
    r"data-dependent|DataDependent|Could not guard": "it decides by the values of tensors",
    r"[Cc]onstraints? violated|ConstraintViolation|specializ|inferred a static shape": "it fixes a size of its inputs",
    r"inconsistencies were found": "its sizes follow from one another in a way that the exporter cannot solve",
    r"pytree|Unsupported.*(input|output)|type of (input|output)": "it takes or returns more than tensors in containers",
    r"device meta|meta tensor": "it needs numbers that only a run with weights has",
    r"complex-valued input": "it computes with complex numbers, which ONNX does not have",
    r"No ONNX function found for <OpOverload\(op='([\w.]+)'": "ONNX has no operator for {}",
    r"No ONNX function|No decompositions|DispatchError": "ONNX has no operator for one of its operators",
}


def refusal(error: BaseException) -> str:
    """Return a clause that says why a model cannot be exported, and where its code is what the exporter refuses.

    Args:
        error: the error of torch's exporter, behind which others may stand.
    """
    chain = [error]
    while (more := chain[-1].__cause__ or chain[-1].__context__) is not None and more not in chain:
        chain.append(more)
    told = "\n".join(f"{type(each).__name__} {each}" for each in chain)
    kinds = (text.format(*found.groups()) for what, text in KINDS.items() if (found := re.search(what, told)))
    kind = next(kinds, "the exporter cannot follow its code")
    where = next((place for each in reversed(chain) if (place := place_of(each))), "")
    return f"{kind}, {where}" if where else kind


def place_of(error: BaseException) -> str:
    """Return the last line of a model's own code that an error passed through; '' if it passed through none."""
    frames = list(traceback.walk_tb(error.__traceback__))
    own = {package for frame, _ in frames if (package := package_of_module(frame)) not in OTHERS}
    lines = [(frame, line) for frame, line in frames if package_of(frame) in own]
    return f"{Path(lines[-1][0].f_code.co_filename).name} line {lines[-1][1]}" if lines else ""


def package_of_module(frame: FrameType) -> str:
    """Return the package of a method of an `nn.Module`; the first of those not to be told for any other function."""
    module = frame.f_locals.get("self")
    return package_of(frame) if isinstance(module, nn.Module) else OTHERS[0]


def package_of(frame: FrameType) -> str:
    """Return the name of the package that a frame's code is part of."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
