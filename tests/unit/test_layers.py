"""Layer keys of the naming schemes that checkpoints in the wild use."""

from __future__ import annotations

import pytest

from tiermem.checkpoint.layers import EMBEDDINGS, HEAD, layer_of

NUMBERED = {
    "model.layers.7.self_attn.q_proj.weight": "model.layers.7",
    "model.layers.10.mlp.down_proj.weight": "model.layers.10",
    "transformer.h.3.attn.c_attn.weight": "transformer.h.3",
    "h.0.ln_1.bias": "h.0",
    "encoder.layer.11.output.dense.weight": "encoder.layer.11",
    "model.decoder.layers.2.fc1.weight": "model.decoder.layers.2",
    "decoder.layers.2.fc1.weight": "decoder.layers.2",
    "gpt_neox.layers.5.attention.dense.bias": "gpt_neox.layers.5",
    "blk.5.attn_q.weight": "blk.5",
    "blocks.4.attn.weight": "blocks.4",
    "layers.0.attention.wq.weight": "layers.0",
    "model.layers.3.mlp.experts.17.up_proj.weight": "model.layers.3",
    "vision_tower.encoder.layers.3.mlp.fc1.weight": "vision_tower.encoder.layers.3",
    "language_model.model.layers.3.mlp.up_proj.weight": "language_model.model.layers.3",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder.block.0",
    "0.auto_model.encoder.layer.2.output.dense.weight": "0.auto_model.encoder.layer.2",
    "model.layers.1.embed_positions.weight": "model.layers.1",
}

EMBEDDED = [
    "model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "tok_embeddings.weight", "token_embd.weight",
    "embeddings.word_embeddings.weight", "embeddings.position_ids", "gpt_neox.embed_in.weight", "shared.weight",
    "transformer.embd.wte.weight", "rope_freqs.weight", "vision_tower.patch_embed.proj.weight",
    "word_embeddings_layernorm.bias", "rotary_pos_emb.inv_freq",
]  # fmt: skip

OTHERS = [
    "lm_head.weight", "output.weight", "model.norm.weight", "transformer.ln_f.bias", "pooler.dense.bias", "classifier",
    "embed_out.weight", "word_embeddings_for_head.weight", "0.weight", "layers.3", "w", "", ".", "..", "3.", "1.2.3",
    "remember.weight", "shared_head.norm", "layers.\u00b2.weight", "layers.\u0663.weight", "layers.3x.weight",
]  # fmt: skip


@pytest.mark.parametrize(("name", "layer"), NUMBERED.items())
def test_numbered_component_closes_the_key(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings(name: str) -> None:
    assert layer_of(name) == EMBEDDINGS


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_the_head(name: str) -> None:
    assert layer_of(name) == HEAD
