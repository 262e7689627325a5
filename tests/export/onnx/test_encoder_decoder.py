"""Encoder-decoders in ONNX Runtime: two files, the second with a cache, of models of sound and of text."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
import transformers
from helpers.exporting import SYMMETRIC_8, quantized, scheme, shapes, tiny
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from quantize.errors import QuantizeError
from quantize.export.onnx.encoder_decoder import DECODER, ENCODER
from quantize.export.onnx.encoder_decoder_parts import EncoderWithCrossKV
from quantize.export.onnx.export import export_onnx, interface_of, leave_unread_out
from quantize.export.onnx.external_data import SHARED, SMALL
from quantize.export.onnx.genai import genai_config_of_sound
from quantize.export.onnx.parity import onnx_parity, open_session, relative_output_error

pytestmark = pytest.mark.slow

PAST, TOTAL = (["batch_size", 4, f"{which}_sequence_length", 8] for which in ("past", "total"))
CROSSED = ["batch_size", 4, 16, 8]


def bart():
    """Reads text: its encoder takes a mask, which cross-attention reads too."""
    layer = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in layer.items()}
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=64, d_model=32, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, **sizes
        )
    ).eval()


MODELS = {
    "whisper": lambda: quantized(tiny("whisper"), scheme(4, SYMMETRIC_8)),
    "bart": lambda: quantized(bart(), scheme(4, group_size=16)),
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A model, where its files are, and how they compare."""
    directory, model = tmp_path_factory.mktemp(request.param), MODELS[request.param]()
    return model, directory, export_onnx(model, directory, samples=[sample(model)])


def sample(model):
    """One sample, as an artifact takes it."""
    feed = interface_of(model).encoder.random.feed(1, 9, seed=5)
    return {name: feed[name] for name in (model.main_input_name, "decoder_input_ids")}


whisper = pytest.mark.parametrize("exported", ["whisper"], indirect=True)


def graph(path):
    return onnx.load(path).graph


def test_the_files_compute_the_model(exported):
    _, directory, differences = exported
    names = [DECODER, ENCODER, "ort_config.json"]
    assert sorted({path.name for path in directory.iterdir()} - {SHARED}) == names
    assert differences["emulation"] < 1e-5 + differences["activations"] / 10
    assert differences["reference"] < 1e-5 + 1.5 * differences["activations"] < 0.1
    assert abs(differences["kl"]) < 1e-4
    assert differences["top1"] > 0.8  # 9 tokens of a random model


def test_token_by_token_they_give_what_the_model_gives_at_once(exported):
    """Samples of two lengths, where the encoder takes a mask; the encoder runs once."""
    model, directory, differences = exported
    interface = interface_of(model)
    feed = interface.encoder.feeds(7)["two"]
    with torch.no_grad():
        expected = model(**feed).logits.numpy()
    encoder, decoder = (open_session(directory / name) for name in (ENCODER, DECODER))
    taken = {value.name: feed[value.name].numpy() for value in encoder.get_inputs()}
    _, *keys = encoder.run(None, taken)
    known = dict(zip(interface.decoder.crossed, keys, strict=True))
    known |= {"encoder_attention_mask": taken["attention_mask"]} if "attention_mask" in taken else {}
    past = dict.fromkeys(interface.decoder.past, np.zeros((2, 4, 0, 8), np.float32))
    found = []
    for t in range(expected.shape[1]):
        token = {"input_ids": feed["decoder_input_ids"][:, t : t + 1].numpy()}
        logits, *present = decoder.run(None, token | known | past)
        past = dict(zip(interface.decoder.past, present, strict=True))
        found.append(logits)
    assert (
        relative_output_error([found], [np.split(expected, len(found), axis=1)]) < 1e-5 + 2 * differences["activations"]
    )


@whisper
def test_sound_goes_in_and_out_as_promised(exported):
    _, directory, _ = exported
    assert shapes(graph(directory / ENCODER).input) == {"input_features": ["batch_size", 8, 32]}
    names = [f"past_key_values.0.{half}.{part}" for half in ("decoder", "encoder") for part in ("key", "value")]
    assert shapes(graph(directory / DECODER).input) == {
        "input_ids": ["batch_size", "sequence_length"],
        **dict(zip(names, [PAST, PAST, CROSSED, CROSSED], strict=True)),
    }
    assert shapes(graph(directory / ENCODER).output) == {
        "encoder_hidden_states": ["batch_size", 16, 32],
        "present.0.encoder.key": CROSSED,
        "present.0.encoder.value": CROSSED,
    }
    assert shapes(graph(directory / DECODER).output) == {
        "logits": ["batch_size", "sequence_length", 64],
        "present.0.decoder.key": TOTAL,
        "present.0.decoder.value": TOTAL,
    }
    precisions = json.loads((directory / "ort_config.json").read_text())["precisions"]
    assert sum(precisions.values()) == 6 + 10 + 1  # the encoder's layer, the decoder's, the scores of the vocabulary
    assert (
        precisions["8-bit weights, 8-bit activations by token, 32-bit sums"] == 6 + 2
    )  # keys and values of the states


def test_no_weight_is_in_both_files(exported):
    """A table that both read lies beside them, once."""
    model, directory, _ = exported
    files = [onnx.load(directory / name, load_external_data=False).graph.initializer for name in (ENCODER, DECODER)]
    within = [{tensor.raw_data for tensor in held if len(tensor.raw_data) > SMALL} for held in files]
    beside = [[str(tensor.external_data) for tensor in held if tensor.external_data] for held in files]
    assert min(map(len, within)) >= 3
    assert not within[0] & within[1]
    assert beside[0] == beside[1]
    if model.main_input_name == "input_features":
        assert not (directory / SHARED).exists()
    else:
        assert (directory / SHARED).stat().st_size == 64 * 32 * 4


@whisper
def test_exchanged_keys_and_values_are_noticed(exported, monkeypatch):
    model, directory, _ = exported
    run = EncoderWithCrossKV.run_files

    def exchanged(self, sessions, feed):
        states, key, value = run(self, sessions, feed)
        return [states, value, key]

    monkeypatch.setattr(EncoderWithCrossKV, "run_files", exchanged)
    interface = interface_of(model)
    differences = onnx_parity(interface, directory, real=[interface.feed_of(sample(model))])
    assert differences["kl"] > 1e-4
    assert differences["emulation"] > 0.1 > 1e-4 + 2 * differences["activations"]


def test_a_file_that_reads_what_it_must_not_is_refused():
    """The tokens that are made, where keys and values should hold for all of them."""
    interface = EncoderWithCrossKV(tiny("whisper"))
    ids, same = (onnx.helper.make_tensor_value_info(name, 7, ["T"]) for name in ("decoder_input_ids", "same"))
    node = onnx.helper.make_node("Identity", ["decoder_input_ids"], ["same"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [ids], [same]))
    with pytest.raises(
        QuantizeError, match=r"the encoder's outputs depend on decoder_input_ids; run the model with quantize.load"
    ):
        leave_unread_out(onnx_ir.from_proto(model), interface)


@whisper
def test_what_onnxruntime_genai_needs(exported):
    """The names of all that goes in and out; checked with it on a model of 1500 positions, the only size it takes."""
    model, directory, _ = exported
    settings = genai_config_of_sound(interface_of(model), {})["model"]
    assert (settings["type"], settings["context_length"], settings["vocab_size"]) == ("whisper", 32, 64)
    for half in (settings["encoder"], settings["decoder"]):
        file = graph(directory / half["filename"])
        named = {name.replace("%d", "0") for name in [*half["inputs"].values(), *half["outputs"].values()]}
        assert named == {value.name for value in [*file.input, *file.output]}
        assert (half["num_hidden_layers"], half["num_key_value_heads"], half["head_size"]) == (1, 4, 8)


@pytest.fixture
def directory(exported, tmp_path):
    """What an export writes, with a tokenizer of 64 words."""
    model, files, _ = exported
    for path in files.iterdir():
        shutil.copy(path, tmp_path)
    model.config.save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"?": 0} | {f"w{n}": n for n in range(1, 64)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    return tmp_path


def expected(model, start, **given):
    made = torch.tensor([start])
    with torch.no_grad():
        while made.shape[1] < len(start) + 5:
            made = torch.cat([made, model(**given, decoder_input_ids=made).logits[:, -1:].argmax(-1)], 1)
    return "".join(f" w{token}" for token in made[0, len(start) :]).replace("w0", "?") + "\n"


def test_it_makes_text(cli, directory, exported):
    """From a file of sound, or from a text; where it begins may be said."""
    model, _, _ = exported
    options = ["run", directory, "--max-new-tokens", 5]
    if model.main_input_name == "input_ids":
        given = {"input_ids": torch.tensor([[7, 8, 9]])}
        assert cli(*options, "--prompt", "w7 w8 w9").out == expected(model, [2], **given)
        return
    given = interface_of(model).encoder.feeds(4)["one"]["input_features"]
    save_file({"input_features": torch.cat([given, given + 1])}, directory / "sound.safetensors")
    options += ["--input", directory / "sound.safetensors"]
    assert cli(*options).out == expected(model, [1], input_features=given)
    assert cli(*options, "--prompt", "w5 w6").out == expected(model, [5, 6], input_features=given)


@whisper
def test_what_is_not_sound_is_refused(cli, directory):
    path = directory / "sound.safetensors"
    save_file({"input_features": torch.zeros(1, 8, 31)}, path)
    takes = "the model takes input_features ['batch_size', 8, 32]"
    for option, message in [
        ([], f"{takes}; give an --input FILE.safetensors that holds this"),
        (["--input", directory / "none.safetensors"], "no such file: "),
        (["--input", path], f"holds input_features [1, 8, 31] as its first sample; {takes}"),
    ]:
        shown = cli("run", directory, *option)
        assert (shown.code, shown.out) == (2, "")
        assert message in shown.err


@pytest.mark.parametrize(("axis", "left"), [(0, ["x"]), (1, ["x", "y"])])
def test_a_size_is_not_read_off_an_input_that_can_go(axis, left):
    """The batch of `y` is that of `x`; nothing else has its length."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    main (float[B, 4] x, float[B, L] y) => (float[B, 4] z, int64[1] n) {{
        n = Shape <start: int = {axis}, end: int = {axis + 1}> (y)
        z = Relu (x)
    }}"""
    model = onnx_ir.from_onnx_text(text)
    leave_unread_out(model, SimpleNamespace(optional=("y",), unread=()))
    assert [value.name for value in model.graph.inputs] == left
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(model).SerializeToString())
    given = {"x": np.ones((3, 4), np.float32), "y": np.ones((3, 5), np.float32)}
    assert session.run(["n"], {name: given[name] for name in left})[0].tolist() == [given["y"].shape[axis]]
