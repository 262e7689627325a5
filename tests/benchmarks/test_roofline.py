"""The roofline against figures worked out by hand for an H200."""

import pytest

from benchmarks.gpu.roofline import SPECIFIED, Product, specified

H200 = SPECIFIED["NVIDIA H200"]


@pytest.mark.parametrize(
    ("product", "us"),
    [
        (Product(1, 4096, 4096), 6.99),  # 33.6 MB over 4.8 TB/s
        (Product(1, 14336, 4096), 24.5),
        (Product(64, 14336, 4096), 25.0),
        (Product(4096, 4096, 4096), 139.0),  # 137 Tflop over 989 Tflop/s
        (Product(4096, 14336, 4096), 486),
        (Product(1, 4096, 4096, 4, 8, 8), 1.75),
        (Product(16, 14336, 4096, 4, 8, 8), 6.23),
        (Product(64, 14336, 4096, 4, 8, 8), 6.55),
        (Product(4096, 14336, 4096, 4, 8, 8), 243),
        (Product(4096, 14336, 4096, 4, 16, 8), 243),  # quantized on the way: int8 tensor cores
        (Product(4096, 14336, 4096, 4, 4, 4), 121.5),
        (Product(1, 14336, 4096, 4, 8, 8, 128, 2), 6.31),  # 0.9 MB of scales in 16 bits
    ],
)
def test_floors(product, us):
    assert product.floor(H200) == pytest.approx(us, rel=4e-3)


def test_bytes_are_those_of_the_operands_and_the_result():
    assert Product(2, 128, 256, 4, 8, 8, 128).bytes == 128 * 256 / 2 + 2 * 256 + 128 * 2 + 2 * 128 * 2


def test_cards_are_known_by_the_beginning_of_their_name():
    assert specified("NVIDIA H200 NVL") is H200
    assert specified("NVIDIA GeForce GT 710") is None
