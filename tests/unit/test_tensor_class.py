"""Tensor classes of the naming schemes that checkpoints in the wild use."""

from __future__ import annotations

import pytest

from tiermem.checkpoint.tensor_class import tensor_class_of
from tiermem.types import TENSOR_CLASSES

NAMES = {
    "llama": {
        "embedding": ["model.embed_tokens.weight"],
        "attention": [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"],
        "mlp": [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")],
        "norm": ["model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
                 "model.norm.weight", "model.layers.0.self_attn.q_norm.weight"],
        "head": ["lm_head.weight"],
    },
    "llama, as its authors name it": {
        "embedding": ["tok_embeddings.weight"],
        "attention": ["layers.0.attention.wq.weight", "layers.0.attention.wo.weight"],
        "mlp": ["layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w2.weight"],
        "norm": ["layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"],
        "head": ["output.weight"],
    },
    "bert": {
        "embedding": ["embeddings.word_embeddings.weight", "bert.embeddings.position_embeddings.weight"],
        "attention": ["encoder.layer.0.attention.self.query.weight", "encoder.layer.0.attention.output.dense.weight"],
        "mlp": ["encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.dense.weight"],
        "norm": ["embeddings.LayerNorm.weight", "encoder.layer.0.attention.output.LayerNorm.bias",
                 "encoder.layer.0.output.LayerNorm.weight"],
        "head": ["pooler.dense.weight", "classifier.weight", "cls.predictions.bias"],
    },
    "gpt2": {
        "embedding": ["wte.weight", "transformer.wpe.weight"],
        "attention": ["h.0.attn.c_attn.weight", "transformer.h.0.attn.c_proj.bias"],
        "mlp": ["h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight"],
        "norm": ["h.0.ln_1.weight", "transformer.ln_f.bias"],
    },
    "opt": {
        "embedding": ["model.decoder.embed_positions.weight"],
        "attention": ["model.decoder.layers.0.self_attn.out_proj.weight"],
        "mlp": ["model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.bias"],
        "norm": ["model.decoder.layers.0.final_layer_norm.weight"],
    },
    "mixtral": {
        "expert": [f"model.layers.0.block_sparse_moe.experts.7.w{i}.weight" for i in (1, 2, 3)],
        "other": ["model.layers.0.block_sparse_moe.gate.weight"],
        "attention": ["model.layers.0.self_attn.k_proj.weight"],
    },
    "qwen and deepseek": {
        "expert": ["model.layers.0.mlp.experts.59.up_proj.weight", "model.layers.0.mlp.experts.gate_up_proj"],
        # Every token passes through these.
        "mlp": ["model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.0.mlp.shared_experts.up_proj.weight",
                "model.layers.0.mlp.gate.weight"],
    },
    "gguf": {
        "embedding": ["token_embd.weight"],
        "attention": ["blk.0.attn_q.weight", "blk.0.attn_output.weight", "blk.0.attn_qkv.bias"],
        "mlp": ["blk.0.ffn_down.weight", "blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_shexp.weight"],
        "expert": ["blk.0.ffn_down_exps.weight", "blk.0.ffn_gate_up_exps"],
        "norm": ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"],
        "head": ["output.weight"],
    },
    "none of these": {
        "other": ["model.layers.0.mixer.A_log", "blk.3.ssm_conv1d.weight"],
        "head": ["", "w", "x.y.z"],
        "mlp": ["layers.0.dense1.weight"],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{scheme}: {name}")
        for scheme, kinds in NAMES.items()
        for kind, names in kinds.items()
        for name in names
    ],
)
def test_what_a_tensor_is_for(name: str, kind: str) -> None:
    assert TENSOR_CLASSES[tensor_class_of(name)] == kind
