"""Checkpoints that are quantized already, broken by seeded mutations: each is read or refused in a sentence."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time

import pytest
from helpers import quantized_sources
from helpers.mutations import taken

from benchmarks.fuzz.mutations import change_bytes, change_tensors, json_value
from quantize.checkpoint.opening import open_checkpoint
from quantize.checkpoint.safetensors_reader import stamp
from quantize.checkpoint.sources import gguf
from quantize.checkpoint.sources.gguf_header import parse_header
from quantize.errors import QuantizeError

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False, "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
SOURCES = {
    "fp8": quantized_sources.fp8,
    "experts in fp8": lambda directory: quantized_sources.fp8(directory, (16, 32), family="qwen3_moe"),
    "pack-quantized": lambda directory: quantized_sources.compressed(directory, "pack-quantized", **INT4),
    "int-quantized": lambda directory: quantized_sources.compressed(directory, "int-quantized", **INT8),
    "float-quantized": lambda directory: quantized_sources.compressed(directory, "float-quantized", **FP8),
    "gptq": lambda directory: quantized_sources.gptq(directory, act_order=True),
    "awq": quantized_sources.awq,
    "modelopt": quantized_sources.modelopt,
    "mxfp4": quantized_sources.mxfp4_experts,
}
COUNT = 12  # of each kind


def read_all(path):
    checkpoint = open_checkpoint(path)
    for name, _ in checkpoint.skeleton().named_parameters():
        checkpoint.float_tensor(name)


@pytest.mark.parametrize("kind", SOURCES)
def test_broken_parts_and_settings_end_in_a_sentence(kind, tmp_path):
    sound, counts = SOURCES[kind](tmp_path / "sound"), {True: 0, False: 0}
    read_all(sound)
    for number in range(COUNT):
        rng, model = random.Random(f"{kind} {number}"), tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(sound, model)
        if rng.random() < 0.25:
            config = json.loads((model / "config.json").read_text())
            config["quantization_config"] = json_value(config["quantization_config"], rng)
            (model / "config.json").write_text(json.dumps(config))
        else:
            rng.choice([change_tensors, change_tensors, change_bytes])(model / "model.safetensors", rng)
        counts[taken(lambda model=model: read_all(model), seconds=5)] += 1
    assert counts[False] > COUNT / 4, counts


def test_a_block_larger_than_the_weight_is_as_large_as_it(tmp_path):
    """Scales were repeated as often as the config says, which takes terabytes."""
    quantized_sources.fp8(tmp_path, (128, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [10**12, 32]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_all(tmp_path)


@pytest.mark.parametrize("size", [10**6, 10**9, 2**62, 2**64 - 1])
def test_numbers_in_a_gguf_header_are_not_believed(size, tmp_path):
    """Numbers of tensors and keys, lengths of names and arrays: each place of eight bytes in turn."""
    path = quantized_sources.gguf_file(tmp_path)
    sound, started = path.read_bytes(), time.process_time()
    for at in range(4, 600, 4):
        path.write_bytes(sound[:at] + struct.pack("<Q", size) + sound[at + 8 :])
        taken(lambda: gguf.cached_header.__wrapped__(path, stamp(path)), seconds=5)
    assert time.process_time() - started < 5


def test_broken_gguf_files_end_in_a_sentence(tmp_path):
    path, counts = quantized_sources.gguf_file(tmp_path), {True: 0, False: 0}
    sound = path.read_bytes()
    for number in range(40):
        rng = random.Random(number)
        content = bytearray(sound)
        content[rng.randrange(1600)] ^= 1 << rng.randrange(8)
        path.write_bytes(content[: rng.choice([len(sound), rng.randrange(len(sound))])])
        counts[taken(lambda: read_all(path), seconds=5)] += 1
    assert counts[False] > 20, counts


def test_a_long_array_in_a_gguf_header_is_gone_past(tmp_path):
    """The package gguf makes objects of the 100 million numbers of this array, some 40 GB."""
    path = tmp_path / "x.gguf"
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 10**8)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
        file.truncate(200_000_000)
    started = time.process_time()
    assert parse_header(path).places == {}
    assert time.process_time() - started < 1


def test_a_gguf_header_of_names_without_end_is_given_up(tmp_path):
    quantized_sources.gguf_file(tmp_path)
    path = tmp_path / "model.gguf"
    key = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 8, 10**12)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
        file.truncate(200_000)
    with pytest.raises(QuantizeError, match="it ends within its header"):
        read_all(path)
