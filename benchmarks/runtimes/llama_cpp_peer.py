"""llama.cpp runs GGUF files in an environment of its own, without this package.

    CMAKE_ARGS='-DGGML_NATIVE=ON' pip install 'llama-cpp-python>=0.3.36,<0.4'    # builds from source

`benchmarks/cpu/peer.py` says what CPUs with AMX need besides.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import numpy.typing as npt

THREADS = 1  # so that a busy machine disturbs a time less
SILENT = api.llama_log_callback(lambda *_: None)
Logits = npt.NDArray[np.float32]


class Model:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: str, length: int = 512) -> None:
        api.llama_log_set(SILENT, ctypes.c_void_p(0))
        self.model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.n_threads = params.n_threads_batch = THREADS
        self.context = api.llama_init_from_model(self.model, params)
        self.vocabulary = api.llama_model_get_vocab(self.model)
        self.words = api.llama_vocab_n_tokens(self.vocabulary)

    def __call__(self, tokens: Sequence[int], start: int = 0) -> Logits:
        """Return logits [T, V] of tokens at positions from `start` on; 0 forgets all tokens before."""
        if start == 0:
            api.llama_memory_clear(api.llama_get_memory(self.context), True)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for number, token in enumerate(tokens):
            batch.token[number], batch.pos[number], batch.logits[number] = token, start + number, 1
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, 0
        failed = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed")
        found = np.ctypeslib.as_array(api.llama_get_logits(self.context), (len(tokens), self.words))
        return np.array(found)

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the most likely tokens after a prompt."""
        chosen = [int(self(tokens)[-1].argmax())]
        while len(chosen) < count:
            chosen.append(int(self(chosen[-1:], len(tokens) + len(chosen) - 1)[-1].argmax()))
        return chosen

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of a text, with the special tokens that the file says are put around it."""
        content, space = text.encode(), 4 * len(text) + 8
        ids = (api.llama_token * space)()
        count = api.llama_tokenize(self.vocabulary, content, len(content), ids, space, True, True)
        return list(ids[:count])


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Return log-probabilities."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return found


def score(reference: str, models: Sequence[str], windows: Sequence[Sequence[int]]) -> dict[str, dict[str, float]]:
    """Return loss, divergence from the reference and agreement on the first token, as `eval/perplexity.py` does."""
    float_model = Model(reference)
    found = {path: float_model if path == reference else Model(path) for path in models}
    sums = {path: np.zeros(3) for path in models}
    for row in windows:
        expected = log_softmax(float_model(row)[:-1])
        for path, model in found.items():
            given = expected if path == reference else log_softmax(model(row)[:-1])
            loss = -given[np.arange(len(given)), row[1:]].sum()
            kl = (np.exp(expected) * (expected - given)).sum()
            sums[path] += [loss, kl, (given.argmax(-1) == expected.argmax(-1)).sum()]
    count = sum(len(row) - 1 for row in windows)
    return {path: dict(zip(("loss", "kl", "top1"), (x / count).tolist(), strict=True)) for path, x in sums.items()}


def speed(models: Sequence[str], prompt: int, decode: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return each model's best seconds for a prompt and for a token after it; models take turns."""
    found = {path: Model(path) for path in models}
    best = {path: {"prompt": np.inf, "token": np.inf} for path in models}
    tokens = np.random.default_rng(0).integers(3, 4000, prompt + decode).tolist()
    for _ in range(rounds):
        for path, model in found.items():
            start = time.perf_counter()
            model(tokens[:prompt])
            best[path]["prompt"] = min(best[path]["prompt"], time.perf_counter() - start)
            for number in range(prompt, prompt + decode):
                start = time.perf_counter()
                model(tokens[number : number + 1], number)
                best[path]["token"] = min(best[path]["token"], time.perf_counter() - start)
    return best


def quantize(source: str, output: str, kind: str) -> None:
    """Let llama.cpp quantize a file to one of its types, such as `Q4_K_M`."""
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}"), THREADS
    api.llama_log_set(SILENT, ctypes.c_void_p(0))
    if api.llama_model_quantize(source.encode(), output.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp cannot quantize {source} to {kind}")


def outputs(model: str, rows: Sequence[Sequence[int]], texts: Sequence[str], new: int, logits: str) -> dict[str, Any]:
    """Write the logits of rows to a file [R, T, V], and return greedy tokens after each row, and the ids of texts."""
    loaded = Model(model)
    np.save(logits, np.stack([loaded(row) for row in rows]))
    return {"greedy": [loaded.greedy(row, new) for row in rows], "ids": [loaded.tokenize(text) for text in texts]}


def main() -> None:
    """Run what a file says, `{"call": NAME, "arguments": {…}}`, and print the result as JSON."""
    task = json.loads(Path(sys.argv[1]).read_text())
    calls: dict[str, Any] = {"score": score, "speed": speed, "quantize": quantize, "outputs": outputs}
    print(json.dumps(calls[task["call"]](**task["arguments"])))


if __name__ == "__main__":
    main()
