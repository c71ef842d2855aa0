"""Page facts: what is known of a model's pages from its manifest alone: layer, reading order, tensor class.

Computed once a model; never changes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.checkpoint.layers import EMBEDDINGS, HEAD
from tiermem.checkpoint.tensor_class import tensor_class_of
from tiermem.types import PAGE_BYTES, TENSOR_CLASSES, Manifest

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True, slots=True)
class PageFacts:
    """One row a page of the model; columns as in tiermem.policy.Pages."""

    segment: npt.NDArray[np.int32]
    layer: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    tensor_class: npt.NDArray[np.int8]


def page_facts_of(manifest: Manifest) -> PageFacts:
    """A segment is one layer, so both have the same number."""
    counts = [segment.pages for segment in manifest.segments]
    first = np.concatenate(([0], np.cumsum(counts)))
    segment = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    order = np.empty(int(first[-1]), np.int32)
    position = 0
    for number in _reading_order([segment.layer for segment in manifest.segments]):
        order[first[number] : first[number + 1]] = np.arange(position, position + counts[number])
        position += counts[number]
    nbytes = np.zeros((int(first[-1]), len(TENSOR_CLASSES)), np.int64)
    for tensor in manifest.tensors:
        extent, kind = tensor.extent, tensor_class_of(tensor.name)
        start, end = extent.offset, extent.offset + extent.length
        base = int(first[extent.segment])
        low, high = start // PAGE_BYTES, -(-end // PAGE_BYTES)
        nbytes[base + low : base + high, kind] += PAGE_BYTES
        if high > low:
            nbytes[base + low, kind] -= start - low * PAGE_BYTES
            nbytes[base + high - 1, kind] -= high * PAGE_BYTES - end
    return PageFacts(segment, segment, order, nbytes.argmax(axis=1).astype(np.int8))


def _reading_order(layers: list[str]) -> list[int]:
    """Numbers of the layers as a forward pass reads them: embeddings, numbered layers tower by tower, head."""
    towers: dict[str, int] = {}

    def key(number: int) -> tuple[int, int, int]:
        layer = layers[number]
        if layer in (EMBEDDINGS, HEAD):
            return (0 if layer == EMBEDDINGS else 2, 0, number)
        numbered = _NUMBERED.fullmatch(layer)
        tower = towers.setdefault(numbered[1] if numbered else layer, len(towers))
        return (1, tower, int(numbered[2]) if numbered else number)

    return sorted(range(len(layers)), key=key)
