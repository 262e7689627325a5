"""Prefix tokens: what the loaded model computes, which tokens are found, and that calibration leaves them out."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.exporting import run_onnx
from helpers.json_files import sign_again
from helpers.soundness import CONFIGS
from safetensors.torch import load_file, save_file
from torch import nn

from quantize import load
from quantize.artifact.verify import verify_artifact
from quantize.calibration.statistics import Absmax
from quantize.errors import QuantizeError, UsageError
from quantize.export.directory import export_artifact
from quantize.export.onnx.decoder import Decoder
from quantize.export.onnx.parity import run_torch
from quantize.nn.prefix_hooks import CACHES
from quantize.nn.prefix_tokens import PrefixTokens
from quantize.nn.quantized_linear import QuantizedLinear
from quantize.pipeline.quantize import quantize_model
from quantize.pipeline.steps import round
from quantize.pipeline.steps.prefix_search import ordered
from quantize.scheme.scheme import Scheme

PREFIX, CHANNEL = (1, 45), 46
IDS = torch.tensor([[403, 407, 261, 378, 432, 383], [286, 261, 268, 379, 416, 422]])
RTN = {"passes": [], "quantizer": {"name": "rtn"}}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def prefixed(**changes):
    return {"prefix": {"tokens": list(PREFIX)}, **changes}


TEXT = "Once upon a time there was a little girl who liked to sit by the sea and look at the boats. " * 8


def in_front(ids):
    return torch.cat([torch.tensor(PREFIX).expand(len(ids), -1), ids], dim=1)


@pytest.fixture(scope="module")
def w4a4(one_layer, stories_calibration, tmp_path_factory):
    """One layer with the default recipe and a prefix."""
    return run_one(one_layer, stories_calibration, tmp_path_factory.mktemp("prefixed") / "out")


def run_one(model, calibration, output, scheme="W4A4", recipe=None, **arguments):
    small = {"group_size": 0, "nsamples": 2, "seqlen": 16, **arguments}
    return quantize_model(
        model, output_dir=output, scheme=scheme, calibration=calibration, recipe=recipe or prefixed(), **small
    )


def without_prefix(artifact, directory):
    """The same weights as a model that knows of no prefix."""
    shutil.copytree(artifact.directory, directory)
    settings = json.loads((directory / "manifest.json").read_text())["quantization"]
    del settings["prefix"]
    sign_again(directory, quantization=settings)
    return load(directory)


@torch.no_grad()
def by_cache(plain, ids):
    """Another way to the same: keys and values of the prefix with float activations, then the tokens, rounded."""
    exact = copy.deepcopy(plain)
    for module in exact.modules():
        if isinstance(module, QuantizedLinear):
            module.scheme = Scheme(weights=module.scheme.weights)
    held = exact(torch.tensor(PREFIX).expand(len(ids), -1), use_cache=True)
    name = next(name for name in CACHES if name in held)
    return plain(ids, **{name: held[name]}).logits


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.slow
@torch.no_grad()
def test_with_float_activations_it_is_the_plain_model_behind_the_prefix(one_layer, artifact_rtn, small_run):
    model = small_run(one_layer, "W4A16", recipe=prefixed(**RTN)).load()
    expected = artifact_rtn.load()(in_front(IDS)).logits[:, len(PREFIX) :]
    assert distance(model(IDS).logits, expected) < 1e-5
    assert distance(artifact_rtn.load()(IDS).logits, expected) > 0.01  # so the check above can fail


@torch.no_grad()
def test_only_the_prefix_is_left_in_floating_point(w4a4, tmp_path):
    plain = without_prefix(w4a4, tmp_path / "plain")
    found, expected = w4a4.load()(IDS).logits, by_cache(plain, IDS)
    assert distance(found, expected) < 1e-4
    assert distance(plain(in_front(IDS)).logits[:, len(PREFIX) :], expected) > 0.01


def test_what_was_written_is_what_was_quantized(w4a4):
    assert w4a4.manifest["quantization"]["prefix"] == list(PREFIX)
    assert json.loads((w4a4.directory / "config.json").read_text())["quantization_config"]["prefix"] == list(PREFIX)
    assert w4a4.manifest["prefix"] == {"tokens": list(PREFIX), "searched": False}
    assert w4a4.manifest["parity"]["reloaded"] == 0
    assert verify_artifact(w4a4.directory)["difference"] < 1e-5


def test_verify_notices_a_prefix_that_is_not_the_one_quantized_with(w4a4, tmp_path):
    changed = tmp_path / "changed"
    without_prefix(w4a4, changed)
    with pytest.raises(QuantizeError, match="its output differs"):
        verify_artifact(changed)


@torch.no_grad()
def test_masks_positions_and_padding(w4a4):
    model, row = w4a4.load(), IDS[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert distance(found, model(row).logits) < 1e-4
    assert distance(model(padded, torch.ones_like(mask)).logits[:, 3:], model(row).logits) > 0.01


@torch.no_grad()
def test_all_that_comes_back_is_of_the_tokens_given(w4a4):
    model = w4a4.load()
    whole = model(IDS, labels=IDS, output_hidden_states=True)
    assert whole.logits.shape[:2] == IDS.shape
    assert {tuple(h.shape[:2]) for h in whole.hidden_states} == {tuple(IDS.shape)}
    loss = nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert float(whole.loss) == pytest.approx(float(loss), rel=1e-5)
    assert torch.equal(model(IDS, return_dict=False)[0], model(IDS).logits)
    assert torch.equal(model(IDS, logits_to_keep=2).logits, model(IDS).logits[:, -2:])
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


@torch.no_grad()
def test_tokens_behind_a_cache(w4a4):
    """With and without mask and positions, which know of no prefix."""
    model = w4a4.load()
    expected = model(IDS).logits[:, 4:]
    for given in ({}, {"attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(4, 6)[None]}):
        first = model(IDS[:, :4], use_cache=True)
        held = {name: first[name] for name in CACHES[:1] if name in first} or {CACHES[1]: first[CACHES[1]]}
        assert distance(model(IDS[:, 4:], **held, **given).logits, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("ignore", [None, []])
def test_generate_with_and_without_cache(one_layer, small_run, ignore):
    """Also where the head is quantized, which is asked for the last logits alone."""
    recipe = prefixed(**RTN, **({} if ignore is None else {"ignore": ignore}))
    model = small_run(one_layer, recipe=recipe).load()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for arguments in ({}, {"num_beams": 2}):
        found = model.generate(IDS, attention_mask=mask, **GREEDY, **arguments)
        assert torch.equal(found[:, :6], IDS)
        assert found.shape == (2, 14)
        assert torch.equal(found, model.generate(IDS, attention_mask=mask, use_cache=False, **GREEDY, **arguments))
    tokens = IDS[1:]
    for _ in range(8):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **GREEDY)[1:], tokens)


@torch.no_grad()
def test_a_model_that_flattens_tokens(tmp_path):
    """Some turn [batch, tokens, K] into [batch * tokens, K] in front of a linear."""
    torch.manual_seed(0)
    config = transformers.OPTConfig.from_dict(json.loads(Path(CONFIGS["opt"]).read_text()) | {"num_hidden_layers": 1})
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in torch.randint(3, 60, (4, 16)).tolist()))
    artifact = run_one(tmp_path / "model", text, tmp_path / "out")
    assert verify_artifact(artifact.directory)["difference"] < 1e-5
    plain, ids = without_prefix(artifact, tmp_path / "plain"), IDS % 60
    assert distance(artifact.load()(ids).logits, by_cache(plain, ids)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["gptq", "gptaq"])
def test_calibration_leaves_the_prefix_out(one_layer, small_run, monkeypatch, quantizer):
    seen = []

    def noted(x, *more, plain):
        seen.append(x.shape[:-1].numel())
        return plain(x, *more)

    update, gram_factors = Absmax.update, round.gram_factors
    monkeypatch.setattr(Absmax, "update", lambda self, x: noted(x, plain=lambda x: update(self, x)))
    monkeypatch.setattr(round, "gram_factors", lambda *given: noted(*given, plain=gram_factors))
    passes = [{"name": "fold_norms"}, {"name": "smoothquant"}]
    small_run(one_layer, recipe=prefixed(passes=passes, quantizer={"name": quantizer}))
    assert len(seen) > 20
    assert set(seen) == {16, 18}  # Gram matrices have the prefix's two rows as well, which weights multiply
    small_run(one_layer, output="plain", recipe={"passes": passes, "quantizer": {"name": quantizer}})
    assert set(seen) == {16, 18, 32}  # without a prefix both rows run at once


def test_rows_by_hand():
    x = torch.arange(12.0).reshape(2, 3, 2)
    leading = PrefixTokens((7,), shape=(2, 3))
    for shaped in (x, x.flatten(0, 1)):
        assert torch.equal(leading.rest(shaped), x[:, 1:].flatten(0, 1))
        found = leading.apart(shaped, lambda first: first * 0, lambda rest: -rest)
        assert found.shape == shaped.shape
        assert torch.equal(found.reshape(x.shape)[:, 0], torch.zeros(2, 2))
        assert torch.equal(found.reshape(x.shape)[:, 1:], -x[:, 1:])
    assert torch.equal(PrefixTokens((7,)).rest(x), x.flatten(0, 1)[1:])  # one sequence
    assert torch.equal(PrefixTokens((7,), shape=(2, 3), absent=True).rest(x), x)
    with pytest.raises(QuantizeError, match="on 5 rows, which are not the tokens of 2 × 3"):
        leading.rest(torch.zeros(5, 2))
    given = [{"input_ids": torch.tensor([[1, 2], [3, 4]])}]
    assert [b["input_ids"].tolist() for b in leading.batches(given)] == [[[7, 1, 2]], [[7, 3, 4]]]


@pytest.mark.parametrize(
    ("ids", "missing"),
    [
        ([[5, 6]], 2),
        ([[1, 45, 6]], 0),  # the whole prefix
        ([[45, 6]], 1),  # its end
        ([[1, 6]], 2),  # its start alone is no end
        ([[45, 1, 45]], 1),
        ([[45]], 1),
        ([[45, 6], [45, 7]], 1),
        ([[45, 6], [5, 7]], 2),  # not in all sequences
    ],
)
def test_tokens_that_are_there_are_not_put_in_front_again(ids, missing):
    ids, leading = torch.tensor(ids), PrefixTokens(PREFIX)
    assert leading.missing(ids) == missing
    front = torch.tensor(PREFIX[:missing], dtype=torch.long).expand(len(ids), -1)
    assert torch.equal(leading.prepended(ids), torch.cat([front, ids], dim=1))


@torch.no_grad()
@pytest.mark.parametrize("first", [PREFIX, PREFIX[1:]])
def test_a_loaded_model_takes_ids_that_begin_with_the_prefix(w4a4, tmp_path, first):
    """What follows is predicted as if these tokens had not been given, with a cache, with masks and without."""
    model, k = w4a4.load(), len(first)
    front = torch.tensor(first).expand(len(IDS), -1)
    ids, expected = torch.cat([front, IDS], dim=1), model(IDS).logits
    for given in ({}, {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6 + k)[None]}):
        found = model(ids, labels=ids, output_hidden_states=True, **given)
        assert distance(found.logits[:, k:], expected) < 1e-4
        assert found.logits.shape[:2] == found.hidden_states[0].shape[:2] == ids.shape
        loss = nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert float(found.loss) == pytest.approx(float(loss), rel=1e-5)
    plain = without_prefix(w4a4, tmp_path / "plain")
    assert distance(expected, by_cache(plain, IDS)) < 1e-4
    assert model(front).logits.shape[:2] == (2, k)  # nothing but the prefix
    step = model(ids[:, :3], use_cache=True)
    held = {name: step[name] for name in CACHES[:1] if name in step} or {CACHES[1]: step[CACHES[1]]}
    assert distance(model(ids[:, 3:], attention_mask=torch.ones_like(ids), **held).logits, expected[:, 3 - k :]) < 1e-4
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(made[:, k:], model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY))
    cacheless = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
    assert torch.equal(made, cacheless)


@pytest.fixture
def planted(variant):
    """A model in which a channel of the residual stream belongs to one token id, and a row of the MLP fires on it."""

    def make(token, name="planted"):
        model = variant(name)
        weights = load_file(model / "model.safetensors")
        for key, W in weights.items():
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                W[CHANNEL] = 0
            if W.dim() == 2 and W.shape[1] == 64 and "o_proj" not in key:
                W[:, CHANNEL] = 0
        gain = float(weights["model.layers.0.post_attention_layernorm.weight"][CHANNEL])
        weights["model.embed_tokens.weight"][token, CHANNEL] = 8 * weights["model.embed_tokens.weight"].std()
        for projection in ("gate_proj", "up_proj"):
            W = weights[f"model.layers.0.mlp.{projection}.weight"]
            W[7] = 0
            W[7, CHANNEL] = 8 / gain
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        return model

    return make


GPTQ = {"quantizer": {"name": "gptq"}}
SEARCH = {"prefix": {"search": True}, **RTN}
DATA = {"nsamples": 8, "seqlen": 64}


def calibration_rows(path):
    """The windows that `DATA` takes."""
    lines = path.read_text().splitlines()
    return [json.loads(lines[i * len(lines) // 8])["input_ids"][:64] for i in range(8)]


def test_the_planted_token_is_found(planted, small_run, stories_calibration):
    rows = calibration_rows(stories_calibration)
    artifact = small_run(planted(426), recipe=SEARCH, **DATA)
    found, count = artifact.manifest["prefix"], sum(row.count(426) for row in rows)
    assert count > 8  # several in a sequence, but there is one id
    assert found == {
        "tokens": [426],
        "searched": True,
        "flagged_per_sequence": count / 8,
        "flagged": {"426": count},
    }
    assert artifact.manifest["quantization"]["prefix"] == [426]
    assert "tokens = [\n    426,\n]" in (artifact.directory / "recipe.toml").read_text()
    assert verify_artifact(artifact.directory)["difference"] < 1e-5


@pytest.mark.slow
def test_a_flagged_first_token_counts_as_the_one_that_begins_texts(planted, small_run, stories_calibration, tmp_path):
    rows = [[426, *(token for token in row[1:] if token != 426)] for row in calibration_rows(stories_calibration)]
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    model = planted(426)
    found = small_run(model, recipe=SEARCH, calibration=text, **DATA).manifest["prefix"]
    assert (found["tokens"], found["flagged_per_sequence"]) == ([1], 1.0)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    found = small_run(model, output="ids", recipe=SEARCH, calibration=text, **DATA).manifest["prefix"]
    assert found["tokens"] == [426]


def test_windows_behind_the_token_that_is_found_have_it_once(planted, small_run, tmp_path, monkeypatch):
    """The tokenizer of the model puts <s>, token 1, in front of texts."""
    text, seen = tmp_path / "a.txt", []
    text.write_text(TEXT)
    batches = PrefixTokens.batches
    monkeypatch.setattr(PrefixTokens, "batches", lambda self, given: seen.append(made := batches(self, given)) or made)
    artifact = small_run(planted(1), recipe=SEARCH | GPTQ, calibration=text, nsamples=4, seqlen=16)
    assert artifact.manifest["prefix"]["tokens"] == [1]
    assert artifact.manifest["calibration"]["leading_tokens"] == [1]
    calibration, probes = seen[0], seen[-1]
    assert [(row["input_ids"] == 1).sum() for row in calibration] == [1] * 4
    assert {row["input_ids"].shape for row in calibration} == {(1, 16)}
    assert [row["input_ids"].shape[1] for row in probes] == [16, 17]  # the second one is random
    assert verify_artifact(artifact.directory)["difference"] < 1e-5


def test_tokens_that_begin_texts_are_the_end_of_the_prefix():
    assert ordered((1, 45, 9), [1]) == (45, 9, 1)
    assert ordered((1, 45), []) == (1, 45)
    assert ordered((9, 45), [1]) == (9, 45)
    assert ordered((5, 6, 7), [7, 5]) == (6, 7, 5)


def test_nothing_flagged_is_no_prefix(one_layer, small_run):
    artifact = small_run(one_layer, recipe=SEARCH)
    found = {"tokens": [], "searched": True, "flagged_per_sequence": 0.0, "flagged": {}}
    assert artifact.manifest["prefix"] == found
    assert "prefix" not in artifact.manifest["quantization"]
    assert "prefix" not in (artifact.directory / "recipe.toml").read_text()


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(planted, small_run, tree):
    model = planted(426)
    first, second = (small_run(model, output=name, recipe=SEARCH, **DATA) for name in "ab")
    assert tree(first.directory) == tree(second.directory)
    again = small_run(model, output="c", recipe=first.directory / "recipe.toml", **DATA)  # resolved: nothing to search
    assert again.manifest["quantization"] == first.manifest["quantization"]
    weights = {path.name: path.read_bytes() for path in first.directory.glob("model-*.safetensors")}
    assert weights.items() <= tree(again.directory).items()


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        ({"tokens": [512]}, "recipe: prefix: the model has no token id 512; give ids from 0 to 511"),
        ({"tokens": [-1]}, "recipe: prefix.tokens.0: input should be greater than or equal to 0"),
        ({}, "recipe: prefix: give either tokens, a list of ids, or search = true"),
        ({"tokens": [1], "search": True}, "give either tokens, a list of ids, or search = true"),
        ({"token": [1]}, "recipe: prefix.token: there is no such key here"),
        ({"tokens": [1] * 500}, "--seqlen 16 with the prefix of 500 is more than the 512 positions of the model"),
    ],
)
def test_a_prefix_that_cannot_be(one_layer, small_run, tmp_path, prefix, words):
    with pytest.raises(UsageError) as refused:
        small_run(one_layer, recipe={"prefix": prefix})
    assert words in str(refused.value)
    assert not list(tmp_path.glob("out*"))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 8), nn.Linear(8, 512)

    def forward(self, ids):
        return self.head(self.embed(ids))


@pytest.mark.slow
def test_models_that_take_no_prefix(minilm, small_run):
    for model, why in ((Tiny(), "the model is a module of its own"), (minilm, "the model does not generate from")):
        with pytest.raises(UsageError, match=f"a prefix needs a causal language model of transformers, and {why}"):
            small_run(model, recipe=prefixed(ignore=[]))


def test_calls_that_cannot_be_right(w4a4):
    model = w4a4.load()
    with pytest.raises(UsageError, match="takes input_ids alone; give these"):
        model(inputs_embeds=torch.zeros(1, 3, 64))
    with pytest.raises(UsageError, match="takes logits_to_keep as a number"):
        model(IDS, logits_to_keep=torch.tensor([0]))
    with pytest.raises(UsageError, match=r"attention_mask has the shape \[2, 7\] for 6 tokens behind 0 in the cache"):
        model(IDS, attention_mask=torch.ones(2, 7))
    first = model.generate(IDS, return_dict_in_generate=True, attention_mask=torch.ones_like(IDS), **GREEDY)
    held = {name: first[name] for name in CACHES[:1] if name in first} or {CACHES[1]: first[CACHES[1]]}
    longer = torch.cat([first.sequences, IDS], dim=1)
    for hidden, words in (
        (0, "begin at position 15 behind 13 in the cache; "),
        (1, "for 5 tokens behind 13 in the cach"),
    ):
        mask = torch.ones_like(longer)
        mask[0, :hidden] = 0
        with pytest.raises(UsageError, match=words):
            model.generate(longer, attention_mask=mask, **copy.deepcopy(held), **GREEDY)


@pytest.mark.slow
def test_the_prefix_is_part_of_an_onnx_file(w4a4, tmp_path):
    """Nothing that goes in or out knows of it, with or without a cache, and it makes a difference."""
    found = export_artifact(w4a4.directory, "onnx", tmp_path / "onnx")
    assert found["emulation"] < found["activations"]
    model = load(w4a4.directory)
    interface = Decoder(model)
    assert interface.prefix == len(PREFIX)
    feed = interface.feed(2, 6, 0, seed=0) | {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    feed["position_ids"] = torch.arange(6).expand(2, -1).contiguous()
    with torch.no_grad():
        expected = model(IDS).logits.numpy()
    np.testing.assert_allclose(run_torch(interface, [feed])[0][0], expected, atol=1e-4)
    logits, *present = run_onnx(tmp_path / "onnx" / "model.onnx", [feed])[0]
    assert np.linalg.norm(logits - expected) < found["activations"] * np.linalg.norm(expected)
    assert present[0].shape == (2, 4, 6, 8)
    interface.prefix = 0
    assert abs(run_torch(interface, [feed])[0][0] - expected).max() > 0.1
