"""Broken and hostile files are made from sound ones by seeded private generators."""

from __future__ import annotations

import copy
import json
import struct
import time

from quantize.errors import QuantizeError

PIECES = [
    *(
        piece.encode()
        for piece in ('"', "{", "}", "[", "]", ",", ":", "=", "0", "-1", "1e999", "null", "NaN", "true", "\r\n")
    ),
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"../../x", b'"a":1,"a":2,', b"a = 1\na = 2\n"),
    *(b"9" * 5000, b"18446744073709551615", b"[" * 3000, b'{"a":' * 3000, b"a." * 3000),
]
VALUES = [
    *(None, True, 0, -1, 3, 10**7, 2**31, 2**63, 10**30, 0.5, float("inf"), float("nan")),
    *("", "x", "../../../etc/passwd", "/etc/passwd", "re:(", "\x00", "\ud800", "9" * 50),
    *([], {}, [[]], {"": {}}, [1, "x", None], {"name": "rtn"}, ["re:.*"]),
]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F6_E2M3",
    "F4",
    "I64",
    "I8",
    "U8",
    "U64",
    "BOOL",
    "C64",
]


def cut_up(content, rng):
    """Return bytes with one to four cuts, flips, insertions or repetitions; one in ten is truncated."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([0, 1, 1, 4, 16, 64]))
        piece = rng.choice([b"", bytes([rng.randrange(256)]), rng.choice(PIECES), content[start:end] * 2])
        content = content[:start] + piece + content[end:] if rng.random() < 0.9 else content[:start]
    return content


def grafted(value, rng):
    """Return plain data with one to three values replaced, left out, or put under another key."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(places_in(value))
        holder, key = rng.choice(places) if places else ({"x": 0}, "x")
        change = rng.random()
        if change < 0.7:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif change < 0.85 and isinstance(holder, dict):
            holder[rng.choice(["", "x", "../x", "name", "a.b"])] = holder.pop(key)
        else:
            del holder[key]
    return value


def places_in(value):
    """Return all (holder, key) of nested dicts and lists."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(value[key])


def with_header(header, data=b""):
    """Return a safetensors file with this header, a dict or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def taken(read, seconds=20):
    """Return whether `read` accepted its input; any error but a sentence of ours, and any delay, fails the test."""
    started = time.monotonic()
    try:
        read()
        found = True
    except QuantizeError as error:
        assert 0 < len(str(error)) < 3000, str(error)[:100]
        found = False
    assert time.monotonic() - started < seconds
    return found
