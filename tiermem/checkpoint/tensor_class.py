"""Tensor class: what a tensor is for, by its name alone. Pure text.

The naming schemes are those of the models in Hugging Face transformers, and of GGUF (`attn_q`, `ffn_down_exps`).
"""

from __future__ import annotations

import re

from tiermem.checkpoint.layers import EMBEDDINGS, HEAD, layer_of
from tiermem.types import TENSOR_CLASSES

_NUMBER = {name: number for number, name in enumerate(TENSOR_CLASSES)}
_RULES = (
    ("norm", re.compile(r"norm|(?:^|[._])ln[._]|(?:^|[._])ln_")),
    ("expert", re.compile(r"(?<!shared_)experts[._]|_exps(?:[._]|$)")),
    ("attention", re.compile(r"attn|attention|(?:^|[._])[qkvo]_proj(?:[._]|$)")),
    (
        "mlp",
        re.compile(
            r"mlp|ffn|feed_forward|intermediate|output\.dense|(?:^|[._])(?:gate|up|down)_proj|(?:^|[._])(?:fc|dense|w)\d"
        ),
    ),
)


def tensor_class_of(name: str) -> int:
    """Index in TENSOR_CLASSES. The first rule that fits: norm, expert, attention, mlp; outside of layers embedding or
    head; else `other`."""
    lowered = name.lower()
    for kind, pattern in _RULES:
        if pattern.search(lowered):
            return _NUMBER[kind]
    layer = layer_of(name)
    return _NUMBER[{EMBEDDINGS: "embedding", HEAD: "head"}.get(layer, "other")]
