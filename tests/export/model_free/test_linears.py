"""Without the model's code, names and shapes say which tensors of a checkpoint are linears."""

import pytest

from quantize.errors import UsageError
from quantize.export.model_free.linears import StoredLinear, find_linears

HEAD = {"model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64), "model.norm.weight": (64,)}


def paths(linears):
    return [linear.path for linear in linears]


def test_matrices_in_numbered_layers_are_linears():
    shapes = {
        **HEAD,
        "model.layers.0.mlp.up_proj.weight": (96, 64),
        "model.layers.0.mlp.up_proj.bias": (96,),
        "model.layers.0.norm.weight": (64,),
        "model.layers.0.conv.weight": (64, 1, 4),
        "model.layers.0.rel_bias.weight": (40, 4),
        "model.layers.1.shared_head.head.weight": (128, 64),
    }
    found, reasons = find_linears(shapes, (), {"vocab_size": 120})
    assert found == [StoredLinear("model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj.weight", 96, 64)]
    assert reasons == {
        "model.embed_tokens.weight": "outside of all numbered layers",
        "lm_head.weight": "outside of all numbered layers",
        "model.norm.weight": "outside of all numbered layers",
        "model.layers.0.norm.weight": "no matrix",
        "model.layers.0.conv.weight": "no matrix",
        "model.layers.0.rel_bias.weight": "fewer than 32 rows or columns",
        "model.layers.1.shared_head.head.weight": "as many rows as a table of words",
    }
    assert "model.layers.1.shared_head.head" in paths(find_linears(shapes, (), {})[0])


def test_what_chooses_experts_stays():
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(40)]
    shapes = {
        **dict.fromkeys(names, (40, 64)),
        "model.layers.0.mlp.gate.weight": (40, 64),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, 64),
        "model.layers.0.self_attn.k_proj.weight": (40, 64),
    }
    found, reasons = find_linears(shapes, (), {})
    assert paths(found) == [*(name.removesuffix(".weight") for name in names), "model.layers.0.self_attn.k_proj"]
    assert set(reasons.values()) == {"it chooses experts"}


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_of_experts_are_turned_by_what_their_router_reads(transposed):
    up, down = ((4, 64, 192), (4, 96, 64)) if transposed else ((4, 192, 64), (4, 64, 96))
    place = "model.layers.0.mlp"
    shapes = {f"{place}.router.weight": (4, 64), f"{place}.experts.gate_up_proj": up,
              f"{place}.experts.down_proj": down, f"{place}.experts.gate_up_proj_bias": (4, 192)}  # fmt: skip
    found, reasons = find_linears(shapes, (), {})
    assert list(reasons) == [f"{place}.router.weight"]
    by_path = {linear.path: (linear.rows, linear.columns, linear.first) for linear in found}
    assert by_path[f"{place}.experts.3.down_proj"] == (64, 96, 0)
    if transposed:
        assert by_path[f"{place}.experts.3.gate_up_proj"] == (192, 64, 0)
    else:
        assert by_path[f"{place}.experts.3.up_proj"] == (96, 64, 96)
    assert {linear.transposed for linear in found} == {transposed}


def test_a_stack_that_nothing_chooses_from_stays():
    found, reasons = find_linears({"layers.0.bank": (4, 64, 64), "layers.0.up.weight": (64, 64)}, (), {})
    assert (paths(found), reasons) == (["layers.0.up"], {})


def test_the_exceptions_of_a_source_stay():
    shapes = {"layers.0.up.weight": (64, 64), "layers.0.gate.weight": (64, 64)}
    found, reasons = find_linears(shapes, {"layers.0.up.weight"}, {})
    assert (paths(found), reasons) == (
        ["layers.0.up"], {"layers.0.gate.weight": "the source leaves it in floating point"}
    )  # fmt: skip


def test_weights_stored_the_other_way_are_refused():
    shapes = {"h.0.c_attn.weight": (64, 192), "h.0.c_attn.bias": (192,)}
    with pytest.raises(UsageError, match=r"h.0.c_attn.weight \[64, 192\] has a bias of 192 numbers, so it is stored"):
        find_linears(shapes, (), {})


def test_the_class_tells_what_is_stored_the_other_way():
    shapes = {"h.0.c_attn.weight": (64, 192), "h.0.c_attn.bias": (192,), "h.0.c_proj.weight": (64, 64)}
    found, _ = find_linears(shapes, (), {}, dict.fromkeys(["h.0.c_attn.weight", "h.0.c_proj.weight"], True))
    assert [(x.rows, x.columns, x.transposed) for x in found] == [(192, 64, True), (64, 64, True)]


@pytest.mark.parametrize(
    ("up", "down", "turned"),
    [
        ((4, 64, 64), (4, 64, 64), None),  # square
        ((4, 96, 64), (4, 64, 96), None),  # two of one size
        ((4, 128, 96), (4, 96, 64), None),  # neither axis is the router's width
        ((4, 128, 64), (4, 64, 64), False),
        ((4, 64, 128), (4, 64, 64), True),
    ],
)
def test_stacks_whose_shape_does_not_tell_stay_unless_the_class_tells(up, down, turned):
    place = "layers.0.mlp"
    shapes = {f"{place}.gate.weight": (4, 64), f"{place}.experts.up": up, f"{place}.experts.down": down}
    found, reasons = find_linears(shapes, (), {}, splits=False)
    assert {x.transposed for x in found} == (set() if turned is None else {turned})
    unknown = "nothing tells whether the stack is [experts, out, in] or [experts, in, out]"
    assert list(reasons.values()).count(unknown) == (2 if turned is None else 0)
    told = dict.fromkeys([f"{place}.experts.up", f"{place}.experts.down"], True)
    found, _ = find_linears(shapes, (), {}, told, splits=False)
    assert [(x.rows, x.columns, x.experts) for x in found] == [(up[2], up[1], 4), (down[2], down[1], 4)]


def test_of_three_stacks_of_one_size_two_read_what_the_router_reads():
    place = "layers.0.mlp"
    shapes = {f"{place}.gate.weight": (4, 64), f"{place}.experts.w1": (4, 96, 64),
              f"{place}.experts.v1": (4, 96, 64), f"{place}.experts.w2": (4, 64, 96)}  # fmt: skip
    assert {x.transposed for x in find_linears(shapes, (), {}, splits=False)[0]} == {False}
