"""llama.cpp and onnxruntime-genai for `bench_cpu` run in an environment of their own, without this package.

    pip install torch==2.13.0 'onnxruntime-genai>=0.18,<0.19' 'transformers>=5' onnx onnx-ir gguf
    CMAKE_ARGS='-DGGML_NATIVE=ON' pip install 'llama-cpp-python>=0.3.36,<0.4'    # builds from source, ten minutes

On CPUs with AMX, gcc 12 assumes that `_tile_loadconfig` reads 8 of 64 bytes, and llama.cpp crashes. Then add
`-DCMAKE_CXX_FLAGS="-include FILE"` to CMAKE_ARGS, where FILE holds

    #include <immintrin.h>
    #define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(p)) : "memory")
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[list[int]], None]  # computes the logits after these tokens, which follow those given before


def make_llama(model: str, output: str) -> None:
    """Write a GGUF without vocabulary, with random Q4_0 matrices: a float16 scale and 32 columns in 18 bytes."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config, rng = json.loads((Path(model) / "config.json").read_text()), np.random.default_rng(0)
    d, f, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(output, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(f)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(d // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    def gain(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(d, np.float32))

    matrix("token_embd", config["vocab_size"], d)
    matrix("output", config["vocab_size"], d)
    gain("output_norm")
    for n in range(layers):
        sizes = {"attn_q": (d, d), "attn_k": (d // heads * kv, d), "attn_v": (d // heads * kv, d),
                 "attn_output": (d, d), "ffn_gate": (f, d), "ffn_up": (f, d), "ffn_down": (d, f)}  # fmt: skip
        for name, (rows, columns) in sizes.items():
            matrix(f"blk.{n}.{name}", rows, columns)
        gain(f"blk.{n}.attn_norm")
        gain(f"blk.{n}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(path: str) -> Step:
    """Run llama.cpp by its C interface, with logits of the last token only."""
    import ctypes

    import llama_cpp as api

    api.llama_backend_init()
    api.llama_log_set(silent := api.llama_log_callback(lambda *_: None), ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2048, 512, 512
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = api.llama_init_from_model(model, params)
    kept = (silent, model)

    def step(tokens: list[int]) -> None:
        given = (api.llama_token * len(tokens))(*tokens)
        if len(tokens) > 1:
            api.llama_memory_clear(api.llama_get_memory(context), True)
        if api.llama_decode(context, api.llama_batch_get_one(given, len(tokens))) or not kept:
            raise RuntimeError("llama_decode failed")
        api.llama_get_logits_ith(context, -1)

    return step


def make_genai(model: str, output: str) -> None:
    """Run onnxruntime-genai's builder: int4 in blocks of 32, accuracy level 4, no zero points."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # needed even if tokens are given as ids
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t0", eos_token="t1")
    fast.save_pretrained(model)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", model, "-o", output, "-c", output]
    options = ["-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    subprocess.run([*command, *options], check=True)


def genai(path: str) -> Step:
    """Run onnxruntime-genai's own loop."""
    import onnxruntime_genai as api

    model, held = api.Model(path), list[Any]()

    def step(tokens: list[int]) -> None:
        if len(tokens) > 1:
            params = api.GeneratorParams(model)
            params.set_search_options(max_length=1024, min_length=1024)
            held[:] = [api.Generator(model, params)]
        held[0].append_tokens(np.array([tokens], np.int32))
        held[0].get_logits()

    return step


def timed(step: Step, vocabulary: int, prompt: int, decode: int, repeats: int) -> dict[str, Any]:
    """Time each prompt and each token after it, in s, after a prompt to warm up; the peak is in MB of 10⁶ bytes."""
    tokens = np.random.default_rng(1).integers(2, vocabulary, prompt + decode).tolist()
    prompts, steps = list[float](), list[float]()
    for given in [tokens[:prompt]] * (repeats + 1) + [[token] for token in tokens[prompt:]]:
        start = time.perf_counter()
        step(given)
        (prompts if len(given) > 1 else steps).append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text()  # counts from `exec` on; getrusage includes the process that forked
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
    return {"prompt": prompts[1:], "decode": steps, "peak_mb": peak}


def main(command: str, *arguments: str) -> None:
    """Run `make_llama|make_genai MODEL OUTPUT`, or `llama|genai PATH VOCABULARY PROMPT DECODE REPEATS`, and print."""
    if command in ("make_llama", "make_genai"):
        return (make_llama if command == "make_llama" else make_genai)(*arguments)
    path, *numbers = arguments
    step = (llama if command == "llama" else genai)(path)
    print(json.dumps(timed(step, *map(int, numbers))))
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
