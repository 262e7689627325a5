"""What was freed is given back."""

import sys
from pathlib import Path

import pytest
import torch

from quantize.pipeline.memory import trim_heap


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_holes_between_blocks_in_use_are_given_back():
    blocks = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each, which the C library does not map one by one
    kept = blocks[::2]
    del blocks
    before = resident()
    trim_heap()
    assert before - resident() > 40e6
    assert all(bool((block == 1).all()) for block in kept)
