"""What every number format keeps: a file in the folder is tested here as soon as it registers."""

import pytest
import torch
from helpers.weights import correlated, gram_of

from quantize.errors import UsageError
from quantize.formats import FORMATS, check_args, check_scheme, get_format
from quantize.formats.qtensor import QTensor
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.quantizers import QUANTIZERS
from quantize.quantizers.base import compute_qparams, grouped, quantization_error
from quantize.recipe.recipe import load_recipe
from quantize.scheme.scheme import ActivationArgs, Scheme, WeightArgs


def default_args(name):
    return WeightArgs(**{"num_bits": 4, "group_size": 32, "format": name} | get_format(name).fixed())


ARGS = {name: default_args(name) for name in FORMATS} | {
    "int asymmetric": WeightArgs(num_bits=4, symmetric=False, group_size=16),
    "int3": WeightArgs(num_bits=3, group_size=32),
    "int3 asymmetric": WeightArgs(num_bits=3, symmetric=False, group_size=16),
    "int8": WeightArgs(num_bits=8),
    "int6 asymmetric": WeightArgs(num_bits=6, symmetric=False),
}
EVERY = pytest.mark.parametrize("args", ARGS.values(), ids=ARGS)


def values_of(args):
    """All values that anything rounds to, ascending."""
    return get_format(args.format).round(torch.linspace(-300, 300, 600_001), args).unique()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EVERY
def test_rounding_takes_the_nearest_value_and_leaves_values_alone(args):
    number_format, values, t = get_format(args.format), values_of(args), 200 * normal(999) ** 3
    assert len(values) <= 2**args.num_bits
    assert torch.equal(number_format.round(values, args), values)
    found, out = number_format.round(t, args), torch.empty_like(t)
    torch.testing.assert_close((found - t).abs(), (values - t[:, None]).abs().amin(dim=1))
    assert number_format.round(t, args, out=out) is out
    assert torch.equal(out, found)


@EVERY
@pytest.mark.parametrize("columns", [6, 7])
def test_unpack_inverts_pack(args, columns):
    number_format, values = get_format(args.format), values_of(args)
    chosen = values[torch.randint(len(values), (columns, 9), generator=torch.Generator().manual_seed(0))].T
    data = number_format.pack(chosen, args)
    in_bits = args.num_bits < 6
    stored = (torch.uint8, (9, -(-columns * args.num_bits // 8))) if in_bits else (torch.int8, (9, columns))
    assert (data.dtype, data.shape) == stored
    found = number_format.unpack(data, columns, args)
    assert found.dtype == number_format.value_dtype
    assert torch.equal(found.to(values), chosen)


@EVERY
def test_any_byte_stands_for_values(args):
    """A damaged file is not read beyond the table."""
    stored = torch.arange(256, dtype=torch.uint8)[:, None]
    data = stored if args.num_bits < 6 else stored.view(torch.int8)
    found = get_format(args.format).unpack(data, {3: 2, 4: 2}.get(args.num_bits, 1), args)
    assert args.num_bits == 6 or torch.isin(found.to(torch.float32), values_of(args)).all()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_positive_and_stored_without_loss(args, dtype):
    number_format, W = get_format(args.format), torch.cat([normal(3, 64), torch.zeros(1, 64), normal(1, 64).abs()])
    global_scale = number_format.global_scale([W])
    assert (global_scale is not None) == number_format.has_global_scale
    scale, _ = number_format.compute_qparams(*grouped(W, args).aminmax(dim=-1), args, dtype, global_scale)
    stored = number_format.encode_scale(scale, global_scale, dtype)
    assert (scale > 0).all()
    assert stored.dtype in number_format.scale_dtypes
    assert torch.equal(number_format.decode_scale(stored, global_scale).float(), scale)


@EVERY
@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_quantized_matrix_is_what_a_qtensor_promises(args, quantizer):
    W, X = normal(12, 64), correlated()
    found = QUANTIZERS[quantizer]().quantize(W, args, gram_of(X), torch.float32)
    found.check("W")
    again = QTensor.pack(found.unpack(), found.scale, found.zero_point, args, found.global_scale)
    assert torch.equal(again.data, found.data)
    assert torch.equal(found.slice_rows(slice(3, 5)).dequantize(), found.dequantize()[3:5])


@EVERY
def test_no_weight_moves_further_than_between_two_values(args):
    W = normal(16, 64)
    found = QUANTIZERS["rtn"]().quantize(W, args, None, torch.float32)
    error = grouped(found.dequantize() - W, args).abs() / found.unpack_scale()[..., None]
    assert error.max() <= values_of(args).diff().max()


@EVERY
def test_a_search_for_scales_makes_no_group_worse(args):
    W = normal(16, 64)

    def errors(mse):
        whole = get_format(args.format).global_scale([W])
        scale, zero_point = (t[..., None] for t in compute_qparams(W, args, W.dtype, mse, global_scale=whole))
        return quantization_error(grouped(W, args), scale, zero_point, args, torch.ones(1))

    plain, searched = errors(False), errors(True)
    assert (searched <= plain).all()
    assert searched.sum() < plain.sum()


@pytest.mark.parametrize("name", FORMATS)
def test_settings_that_a_format_fixes_are_refused_otherwise(name):
    others = {"num_bits": 8, "symmetric": not get_format(name).fixed().get("symmetric"), "group_size": 8}
    for key in get_format(name).fixed():
        with pytest.raises(ValueError, match=rf"^{name} weights need .*{key} = .*, not .*{others[key]}".lower()):
            check_args(default_args(name).model_copy(update={key: others[key]}))


def test_a_format_that_nobody_wrote():
    with pytest.raises(
        ValueError, match="there is no number format 'nf5'; known are dint4, dint4_full, int, iq4_nl, m"
    ):
        check_args(WeightArgs(num_bits=4, format="nf5"))
    with pytest.raises(UsageError, match=r"^recipe: activations: there is no number format 'fp8'"):
        load_recipe("W4A4", {"activations": {"format": "fp8"}})


@pytest.mark.parametrize("name", ["iq4_nl", "dint4", "dint4_full"])
def test_a_code_book_of_integers_multiplies_integer_activations(name):
    scheme = Scheme(weights=WeightArgs(num_bits=4, format=name, group_size=32), activations=ActivationArgs(num_bits=8))
    W, x = normal(24, 64), normal(5, 64, seed=1)
    weight = QUANTIZERS["rtn"](mse=True).quantize(W, check_scheme(scheme).weights, None, torch.float32)
    layer = QuantizedLinear(weight, None, scheme)
    assert layer.qtensor().unpack().dtype == torch.int8
    torch.testing.assert_close(layer(x), layer.fake_quantized(x), rtol=1e-5, atol=1e-5)
    assert ((layer(x) - x @ W.T).norm() / (x @ W.T).norm()) < 0.12
    assert load_recipe("W4A8", {"weights": {"format": name}}).weights.symmetric
