"""What the exporter says becomes a clause that is true of the model."""

import pytest

from quantize.graph.refusal import refusal

NO_FUNCTION = "No ONNX function found for <OpOverload(op='aten.{}', overload='default')>. Failure message: {}"
COMPLEX = "No decompositions registered for the complex-valued input"


@pytest.mark.parametrize(
    ("said", "clause"),
    [
        (NO_FUNCTION.format("unsqueeze", COMPLEX), "it computes with complex numbers, which ONNX does not have"),
        (NO_FUNCTION.format("histc", "No decompositions"), "ONNX has no operator for aten.histc"),
        ("Could not guard on data-dependent expression u0 < 1", "it decides by the values of tensors"),
        (
            "Found the following conflicts between user-specified ranges and inferred ranges from model tracing:\n- "
            "Received user-specified dim hint Dim.DYNAMIC, but tracing inferred a static shape of 5 for dimension 1.",
            "it fixes a size of its inputs",
        ),
        (
            "The following inconsistencies were found:\nEq(s16 + Max(0, 1 - s19), 1) is inconsistent!",
            "its sizes follow from one another in a way that the exporter cannot solve",
        ),
        ("something else", "the exporter cannot follow its code"),
    ],
)
def test_what_the_exporter_says_is_a_clause(said, clause):
    error = RuntimeError("Failed to export the model")
    error.__cause__ = ValueError(said)
    assert refusal(error) == clause
