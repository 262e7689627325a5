"""Every inline-assembly formula of the kernels on all 65,536 patterns of 16 bits, run from the very text they hold."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import ptx

from quantize.kernels import tiles

KERNELS = Path(__file__).parents[2] / "kernels"
TESTED = {"SHIFT_ASM", "MASK_ASM", "PAIR_ASM"}


def words():
    """Each pattern in each place of a word, with zeros around it and with ones: uint32 [6 · 65536]."""
    patterns = np.arange(1 << 16, dtype=np.uint32)
    around = [(patterns << np.uint32(shift), np.uint32(~(0xFFFF << shift) & 0xFFFFFFFF)) for shift in (0, 8, 16)]
    return np.concatenate([word | rest for word, ones in around for rest in (np.uint32(0), ones)])


def as_bytes(word):
    """uint32 [n] → int64 [n, 4], signed bytes."""
    return word.view(np.int8).reshape(-1, 4).astype(np.int64)


def nibbles(word):
    """The weights in a word, by the layout `w4`: w[i] and w[i + 64], both int64 [n, 4]."""
    byte = as_bytes(word)
    return (byte & 15) - 8, byte >> 4


def operands(assembly):
    """What a formula makes of all words: the low and the high operand, int64 [n, 4]."""
    return [as_bytes(found) for found in ptx.run(assembly.value, words(), outputs=2)]


def test_shift():
    (low, high), (w_low, w_high) = operands(tiles.SHIFT_ASM), nibbles(words())
    assert np.array_equal(low, 16 * w_low) and np.array_equal(high, 16 * w_high)


def test_mask():
    (low, high), (w_low, w_high) = operands(tiles.MASK_ASM), nibbles(words())
    assert np.array_equal(low, w_low + 8) and np.array_equal(high, 16 * w_high)


def test_pair():
    (low, high), (w_low, w_high) = operands(tiles.PAIR_ASM), nibbles(words())
    assert np.array_equal(low, w_low + 8) and np.array_equal(high, 16 * w_high + w_low + 8)


def test_pairs_of_activations_give_sixteen_times_the_product():
    """(16 a - h) · u + h · b = 16 (h · w_high + a · w_low + 8 a), for all bytes b and all pairs of activations."""
    byte = np.arange(-128, 128)
    w_low, w_high = (byte & 15) - 8, byte >> 4
    a, h = np.arange(-8, 8)[:, None, None], np.arange(-8, 8)[:, None] - 7
    assert np.abs(16 * a - h).max() <= 128 and (16 * a - h).max() <= 127
    assert np.array_equal((16 * a - h) * (w_low + 8) + h * byte, 16 * (h * w_high + a * w_low + 8 * a))


def test_signed_nibbles_are_the_packed_ones_with_one_bit_flipped():
    byte = np.arange(256, dtype=np.uint8)
    flipped = byte ^ np.uint8(8)
    low = ((flipped << 4).view(np.int8) >> 4).astype(np.int64)
    assert np.array_equal(low, (byte & 15).astype(np.int64) - 8)


def test_no_inline_assembly_is_left_out():
    sources = {path.name: path.read_text() for path in KERNELS.glob("*.py")}
    named = {name for text in sources.values() for name in re.findall(r"^(\w+_ASM)\b", text, re.MULTILINE)}
    assert named == TESTED
    calls = {name: text.count("inline_asm_elementwise(") for name, text in sources.items()}
    assert {name: count for name, count in calls.items() if count} == {"tiles.py": 1}


@pytest.mark.parametrize("table", [0xC0, 0xFC, 0x3C, 0x6A, 0xE8, 0x96])
def test_lop3_is_what_the_isa_says(table):
    """The table of a function is what it gives for 0xF0, 0xCC and 0xAA."""
    given = [np.array([value], np.uint32) for value in (0xF0, 0xCC, 0xAA)]
    assert ptx.lop3(*given, table)[0] & 0xFF == table


def test_prmt():
    a, b = np.array([0x83828180], np.uint32), np.array([0x07060504], np.uint32)
    assert ptx.prmt(a, b, 0x7610)[0] == 0x07068180
    assert ptx.prmt(a, b, 0xC9D8)[0] == 0x00FF00FF
