"""Content: what a model is apart from where it lies, so that hosts find that they have the same weights. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from tiermem.types import Manifest


def content_of(manifest: Manifest, digests: Sequence[bytes | None]) -> str | None:
    """BLAKE3 hex over name, dtype, shape, extent and digest of every tensor, in order; None while a digest is unknown.

    Equal content means equal bytes in equal places, so that segments of one model may be filled from another's.
    """
    content = blake3()
    for tensor, digest in zip(manifest.tensors, digests, strict=True):
        if digest is None:
            return None
        extent = tensor.extent
        placed = (tensor.name, tensor.dtype, tensor.shape, extent.segment, extent.offset, extent.length)
        content.update(repr(placed).encode())
        content.update(digest)
    return content.hexdigest()
