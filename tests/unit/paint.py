"""Paint: small images whose bytes follow from their fingerprint, so that any process can fill one and judge one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tiermem.client import Client
from tiermem.draft import Draft
from tiermem.embedded import EmbeddedPool
from tiermem.fingerprint import fingerprint_of, identity_of
from tiermem.model import Model
from tiermem.types import PAGE_BYTES, ImageTensor

TENSORS = (
    ImageTensor("model.embed_tokens.weight", "BF16", (64, 32)),
    ImageTensor("model.layers.0.qkv", "F32", (300, 1024)),
    ImageTensor("model.layers.0.scale", "F64", ()),
    ImageTensor("model.layers.1.qkv", "U8", (PAGE_BYTES + 5,)),
    ImageTensor("buffer", "F32", (0, 4), layer="model.layers.1"),
)
PAGES = 4
"""That they take: one, one, and two."""


def prints(seed: object = 0, **fields: str) -> dict[str, str]:
    """A fingerprint."""
    return {"engine": "painter 1.0", "checkpoint": str(seed), "rank": "0"} | fields


def drawn(
    pool: Client | EmbeddedPool,
    seed: object = 0,
    name: str | None = None,
    tensors: Sequence[ImageTensor] = TENSORS,
    metadata: Mapping[str, str] | None = None,
) -> Draft:
    """An image that nobody has made yet, empty."""
    draft = pool.create_image(prints(seed), tensors, name=name, metadata=metadata)
    assert isinstance(draft, Draft)
    return draft


def sealed(
    pool: Client | EmbeddedPool, seed: object = 0, name: str | None = None, tensors: Sequence[ImageTensor] = TENSORS
) -> Model:
    """An image that nobody has made yet, filled and sealed."""
    draft = drawn(pool, seed, name, tensors)
    fill(draft)
    return draft.seal()


def fill(draft: Draft) -> None:
    """Write every byte of it."""
    fields = fingerprint_of(draft.manifest)
    for name in draft:
        draft.raw(name)[:] = paint(fields, name, draft.info(name).nbytes)


def painted(image: Draft | Model) -> bool:
    """Whether it holds exactly what `fill` writes."""
    fields = fingerprint_of(image.manifest)
    return all(bytes(image.raw(name)) == paint(fields, name, image.info(name).nbytes) for name in image)


def paint(fingerprint: Mapping[str, str], name: str, nbytes: int) -> bytes:
    return np.random.default_rng((int(identity_of(fingerprint)[:16], 16), *name.encode())).bytes(nbytes)
