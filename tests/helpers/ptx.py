"""A few instructions of PTX run on arrays of 32-bit words, enough to run the kernels' inline assembly on a CPU."""

from __future__ import annotations

import re

import numpy as np

WORD = np.uint32


def lop3(a, b, c, table):
    """Compute any function of three bits (PTX ISA, 9.7.8.6): bit i of the table is its value at the bits of i."""
    result = np.zeros_like(a)
    for minterm in range(8):
        if table >> minterm & 1:
            terms = [x if minterm >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def prmt(a, b, selector):
    """Permute bytes (9.7.8.7); bit 3 of a nibble of the selector asks for the sign of the byte."""
    source, result = [(x >> WORD(8 * byte)) & WORD(0xFF) for x in (a, b) for byte in range(4)], np.zeros_like(a)
    for place in range(4):
        chosen = int(selector) >> 4 * place & 0xF
        byte = source[chosen & 7]
        result |= (np.where(byte & WORD(0x80), WORD(0xFF), WORD(0)) if chosen & 8 else byte) << WORD(8 * place)
    return result


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shr.b32": lambda a, b: a >> b,
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "lop3.b32": lambda a, b, c, table: lop3(a, b, c, int(table[0])),
    "prmt.b32": lambda a, b, selector: prmt(a, b, selector[0]),
}


def run(assembly, *inputs, outputs):
    """Return `$0`, `$1`, … after inline assembly, for inputs uint32 [n] in the operands after them."""
    held = {f"${outputs + place}": np.asarray(given, WORD) for place, given in enumerate(inputs)}
    size = len(inputs[0])
    for statement in re.sub(r"[{}\n]", " ", assembly).split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = [part.strip() for part in rest.split(",")]
        values = [held[source] if source in held else np.full(size, int(source, 0), WORD) for source in sources]
        held[target] = OPERATIONS[name](*values)
    return [held[f"${place}"] for place in range(outputs)]
