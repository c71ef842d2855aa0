"""The layout of a model in shared memory: raw tensors -> segments and extents. Pure; knows no format, does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from blake3 import blake3

from tiermem.checkpoint.layers import layer_of
from tiermem.checkpoint.strict_json import shown
from tiermem.errors import TensorNotFound
from tiermem.types import TENSOR_ALIGN, CheckpointFile, Extent, SegmentInfo, TensorInfo


class RawTensor(NamedTuple):
    """A tensor as its file describes it: `nbytes` at `file_offset` of file number `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    file_offset: int
    nbytes: int


def lay_out(
    raw: Sequence[RawTensor], layers: Mapping[str, str] | None = None
) -> tuple[tuple[SegmentInfo, ...], tuple[TensorInfo, ...]]:
    """Segments in order of their layers' first tensors, and every tensor, in checkpoint order, with its extent.

    A tensor starts at the first multiple of TENSOR_ALIGN behind the one before it in its segment. A segment's length
    is the end of its last tensor. An empty tensor lies at offset 0, and a segment of such tensors has length 1, so
    that it has a page. `layers` overrides tensor name -> layer key. Raises TensorNotFound for a name in `layers`
    that no tensor has.
    """
    layers = layers or {}
    if unknown := layers.keys() - {tensor.name for tensor in raw}:
        raise TensorNotFound(
            f"layers names {len(unknown)} tensors that the checkpoint lacks: {shown(sorted(unknown))}; remove them"
        )
    segments: dict[str, int] = {}
    ends: list[int] = []
    tensors = []
    for name, dtype, shape, file, file_offset, nbytes in raw:
        segment = segments.setdefault(layers[name] if name in layers else layer_of(name), len(ends))
        if segment == len(ends):
            ends.append(0)
        offset = -(-ends[segment] // TENSOR_ALIGN) * TENSOR_ALIGN if nbytes else 0
        ends[segment] = max(ends[segment], offset + nbytes)
        tensors.append(TensorInfo(name, dtype, shape, file, file_offset, Extent(segment, offset, nbytes)))
    infos = tuple(SegmentInfo(layer, max(end, 1)) for layer, end in zip(segments, ends, strict=True))
    return infos, tuple(tensors)


def identity_of(files: Iterable[CheckpointFile]) -> str:
    """BLAKE3 hex over the facts of all files, whatever their paths, their order, and the layers they are cut into."""
    facts = sorted(f"{f.device} {f.inode} {f.size} {f.mtime_ns} {f.header_digest}\n" for f in files)
    return blake3("".join(facts).encode()).hexdigest()
