"""llm-compressor's GPTQ runs on the same model and tokens, in its own environment without this package."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def words(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of words t0, t1, ..., which the peer needs even if the data are ids."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token="t0")


def peak_memory() -> float:
    """Return the peak so far in MB of 10⁶ bytes, counted from `exec` on; getrusage would include the parent process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main(model: str, tokens: str, output: str, name: str, samples: str, seqlen: str) -> None:
    """Quantize all linears but the last to W4A16, symmetric in groups of 128, and save; in float32 if the name says."""
    memory = peak_memory()
    start, cpu = time.perf_counter(), time.process_time()
    rows = [json.loads(line) for line in Path(tokens).read_text().splitlines()]
    data = Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])
    dtype = torch.float32 if name.endswith("float32") else torch.bfloat16
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    recipe = GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])
    oneshot(model=loaded, dataset=data, recipe=recipe, tokenizer=words(loaded.config.vocab_size),
            max_seq_length=int(seqlen), num_calibration_samples=int(samples))  # fmt: skip
    loaded.save_pretrained(output, save_compressed=True)
    peak = peak_memory()
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    artifact = sum(path.stat().st_size for path in Path(output).rglob("*") if path.is_file()) / 1e6
    print(json.dumps({**spent, "peak_mb": peak, "interpreter_mb": memory, "artifact_mb": artifact}))


if __name__ == "__main__":
    main(*sys.argv[1:])
