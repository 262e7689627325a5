"""The analysis of a large model takes time and memory, which are measured here; no weight is read."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import TypeVar

from quantize.checkpoint.meta_model import build_skeleton
from quantize.graph.analysis import admissible_bases
from quantize.graph.export import export_program

T = TypeVar("T")
EIGHT_BILLION = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def timed(what: str, run: Callable[[], T]) -> T:
    """Run, and print the seconds it took and the peak memory up to then."""
    start = time.perf_counter()
    result = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:<28} {time.perf_counter() - start:6.1f} s   peak {peak:.2f} GiB")
    return result


def main() -> None:
    """Build, export and analyze a 32-layer model of eight billion parameters on the meta device."""
    start = time.perf_counter()
    skeleton = timed("skeleton", lambda: build_skeleton(EIGHT_BILLION))
    program = timed("export", lambda: export_program(skeleton))
    bases = timed("analysis, gains folded too", lambda: admissible_bases(program))
    nodes = sum(len(segment.nodes) for segment in program.segments)
    print(f"{nodes} nodes, {len(bases)} bases, {time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
