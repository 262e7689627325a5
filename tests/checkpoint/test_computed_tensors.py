"""What a model computes and never saves is there all the same."""

from __future__ import annotations

import torch
from transformers import MarianConfig, MarianMTModel

from quantize.checkpoint.opening import open_checkpoint

SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
SIZES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 24, "pad_token_id": 63}


def test_sinusoidal_positions_that_no_file_holds_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    model = MarianMTModel(MarianConfig(vocab_size=64, decoder_start_token_id=63, **SIZES)).eval()
    model.save_pretrained(tmp_path)
    checkpoint, name = open_checkpoint(tmp_path), "model.decoder.embed_positions.weight"
    assert name not in checkpoint.sources
    torch.testing.assert_close(checkpoint.tensor(name), model.get_parameter(name).detach(), rtol=0, atol=0)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        found, expected = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (checkpoint.load(), model))
    assert torch.equal(found, expected)
