"""llm-compressor runs a cell of `bench_models` in an environment of its own, without this package.

    pip install torch==2.13.0 && pip install 'llmcompressor==0.14.*'

It is calibrated and scored on the same token ids as ours, in float32, and the head stays in floating point. Weights
are symmetric in groups of 128, or of 64 or 32 for models with columns that 128 does not divide, which it refuses.
"""

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
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.scale.peer import peak_memory

GROUPS, NEW_TOKENS = (128, 64, 32), 24
# The tool takes the norm behind Gemma's attention for the one in front of its MLP, which would change the function.
GEMMA = [
    (["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"),
    (["re:.*gate_proj", "re:.*up_proj"], "re:.*pre_feedforward_layernorm"),
]


def handlers(model: Any, recipe: str) -> list[Any]:
    """Return what runs before GPTQ."""
    if "SmoothQuant" in recipe:
        sandwiched = any("pre_feedforward_layernorm" in name for name, _ in model.named_modules())
        return [SmoothQuantModifier(smoothing_strength=0.5, mappings=GEMMA if sandwiched else None)]
    if "QuIP" in recipe:
        return [QuIPModifier(rotations=["v", "u"], transform_type="random-hadamard", ignore=["lm_head"])]
    return [SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard")] if "SpinQuant" in recipe else []


def gptq(model: Any, scheme: str) -> GPTQModifier:
    """Return GPTQ of all linears but the head, in the largest groups that divide the columns of all of them."""
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    group = next(size for size in GROUPS if all(linear.in_features % size == 0 for linear in linears))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    tokens = {"num_bits": int(scheme[3:]), "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    inputs = None if scheme == "W4A16" else tokens
    groups = {"all": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return GPTQModifier(config_groups=groups, ignore=["lm_head"])


def quantize(model: Any, recipe: str, scheme: str, calibration: Path, tokenizer: Any) -> None:
    """Calibrate and quantize a model in place."""
    rows = [json.loads(line)["input_ids"] for line in calibration.read_text().splitlines()]
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    oneshot(model=model, dataset=data, recipe=[*handlers(model, recipe), gptq(model, scheme)], tokenizer=tokenizer,
            max_seq_length=max(map(len, rows)), num_calibration_samples=len(rows))  # fmt: skip


@torch.no_grad()
def scores(model: Any, reference: Any, windows: list[list[int]]) -> dict[str, float]:
    """Return the loss, the divergence from the float model and the agreement on the first token, as ours are defined.

    `quantize.eval.perplexity.score_language` defines them.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for row in windows:
        ids = torch.tensor([row])
        logits, expected = (m(input_ids=ids).logits[0, :-1].float() for m in (model, reference))
        kl = kl_div(log_softmax(logits, -1), log_softmax(expected, -1), reduction="sum", log_target=True)
        loss, agree = cross_entropy(logits, ids[0, 1:], reduction="sum"), logits.argmax(-1) == expected.argmax(-1)
        sums += torch.stack([loss.double(), kl.double(), agree.sum().double()])
    return dict(zip(("loss", "kl", "top1"), (sums / sum(len(row) - 1 for row in windows)).tolist(), strict=True))


def measure(scheme: str, recipe: str, directory: str, data: Path, output: Path) -> dict[str, Any]:
    """Quantize, score in memory and save in the type that the model is stored in, of which only the bytes count.

    The peak of memory is that before scores and before saving.
    """
    start, tokenizer = time.process_time(), AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    quantize(model, recipe, scheme, data / "calibration.jsonl", tokenizer)
    found: dict[str, Any] = {"seconds": time.process_time() - start, "peak_mb": peak_memory()}
    evaluation = json.loads((data / "evaluation.json").read_text())
    reference: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found["texts"] = {name: scores(model, reference, windows) for name, windows in evaluation["texts"].items()}
    prompt = torch.tensor([evaluation["prompt"]])
    written = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW_TOKENS,
                             do_sample=False, pad_token_id=0)  # fmt: skip
    found["continuation"] = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    start = time.process_time()
    model.to(AutoConfig.from_pretrained(directory).dtype or torch.float32).save_pretrained(output, save_compressed=True)
    found["seconds"] += time.process_time() - start
    return found | {"artifact_mb": sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e6}


def main(_: str, scheme: str, recipe: str, model: str, data: str, output: str) -> None:
    """Measure one cell and print its figures, or why there are none."""
    try:
        found = measure(scheme, recipe, model, Path(data), Path(output))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
