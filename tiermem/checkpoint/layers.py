"""Layer keys: which segment a tensor belongs to, by its name alone. Pure text; never a file's name (keys may hold `/`).

The rule, on the components that dots separate:

1. The first component that is a decimal number, has a component that is no number somewhere before it and any
   component after it, closes the key: `model.layers.7.mlp.up.weight` -> `model.layers.7`. The prefix is kept, so the
   towers of a multimodal model stay apart, and an expert stays with its layer.
2. Otherwise a tensor whose name has a word that starts with `emb`, `position` or `rope`, or a component `wte`, `wpe`
   or `shared`, is one of the `embeddings`, unless a word starts with `head` or is `embed_out`.
3. Everything else (norms, lm_head, output, pooler, classifier) is the `head`.

The naming schemes are those of the models in Hugging Face transformers, and of GGUF (`blk.N.`, `token_embd`), as
llama.cpp's `gguf-py/gguf/tensor_mapping.py` lists them side by side.
"""

from __future__ import annotations

import re

EMBEDDINGS = "embeddings"
HEAD = "head"

_EMBEDDING = re.compile(r"(?:^|[._])(?:emb|position|rope|(?:wte|wpe|shared)(?:\.|$))")
_HEAD = re.compile(r"(?:^|[._])(?:head|embed_out)")


def layer_of(name: str) -> str:
    """Layer key of the tensor `name`."""
    components = name.split(".")
    after_word = False
    for i, component in enumerate(components[:-1]):
        if not (component.isdecimal() and component.isascii()):
            after_word = True
        elif after_word:
            return ".".join(components[: i + 1])
    return EMBEDDINGS if _EMBEDDING.search(name) and not _HEAD.search(name) else HEAD
