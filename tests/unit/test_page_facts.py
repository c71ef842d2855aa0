"""Page facts: layer, reading order and tensor class of each page, as the manifest has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiermem.checkpoint.layers import layer_of
from tiermem.checkpoint.layout import RawTensor, lay_out
from tiermem.checkpoint.tensor_class import tensor_class_of
from tiermem.page_facts import page_facts_of
from tiermem.types import PAGE_BYTES, TENSOR_CLASSES, Extent, Manifest, SegmentInfo, TensorInfo

NAMES = ("q_proj.weight", "mlp.up_proj.weight", "mlp.experts.3.w1", "norm.weight", "x")


def manifest_of(tensors: Sequence[tuple[str, int]]) -> Manifest:
    """A manifest of (name, bytes), laid out as a checkpoint is."""
    raw, at = [], 0
    for name, nbytes in tensors:
        raw.append(RawTensor(name, "U8", (nbytes,), 0, at, nbytes))
        at += nbytes
    segments, infos = lay_out(raw, {name: layer_of(name) for name, _ in tensors})
    return Manifest("/weights", "id", (), segments, infos)


def reading_order(layers: Sequence[str]) -> list[str]:
    """Layers of a page each, in the order in which their pages are read."""
    segments = tuple(SegmentInfo(layer, PAGE_BYTES) for layer in layers)
    order = page_facts_of(Manifest("/weights", "id", (), segments, ())).order
    return [layers[i] for i in np.argsort(order)]


def test_pages_are_numbered_by_layer_and_read_in_order() -> None:
    page = PAGE_BYTES
    manifest = manifest_of([
        ("lm_head.weight", page + 1), ("layers.10.mlp.up", page), ("layers.2.mlp.up", 2 * page), ("embed", page),
    ])  # fmt: skip
    assert [segment.layer for segment in manifest.segments] == ["head", "layers.10", "layers.2", "embeddings"]
    facts = page_facts_of(manifest)
    assert facts.segment.tolist() == facts.layer.tolist() == [0, 0, 1, 2, 2, 3]
    assert facts.order.tolist() == [4, 5, 3, 1, 2, 0]
    kinds = [TENSOR_CLASSES[kind] for kind in facts.tensor_class]
    assert kinds == ["head", "head", "mlp", "mlp", "mlp", "embedding"]
    assert {name: getattr(facts, name).dtype.name for name in ("segment", "layer", "order", "tensor_class")} == {
        "segment": "int32", "layer": "int32", "order": "int32", "tensor_class": "int8"}  # fmt: skip


def test_layers_are_read_tower_by_tower_and_by_number() -> None:
    assert reading_order(["layers.10", "layers.9", "head", "layers.1", "embeddings"]) == [
        "embeddings", "layers.1", "layers.9", "layers.10", "head"]  # fmt: skip
    towers = ["vision.layers.1", "text.layers.0", "vision.layers.0", "text.layers.1"]
    assert reading_order(towers) == ["vision.layers.0", "vision.layers.1", "text.layers.0", "text.layers.1"]
    assert reading_order(["b", "a", "head"]) == ["b", "a", "head"], "what the user named is read as it came"


@given(st.lists(st.text("layers.0123headmb", max_size=12) | st.sampled_from(["head", "embeddings"]), unique=True))
def test_every_page_is_read_once(layers: list[str]) -> None:
    assert sorted(reading_order(layers)) == sorted(layers)


def test_a_page_is_what_most_of_its_bytes_are() -> None:
    half = PAGE_BYTES // 2
    (kind,) = page_facts_of(manifest_of([("layers.0.q_proj.w", half - 4096), ("layers.0.mlp.w", half)])).tensor_class
    assert TENSOR_CLASSES[kind] == "mlp"
    (kind,) = page_facts_of(manifest_of([("layers.0.q_proj.w", half), ("layers.0.mlp.w", half - 4096)])).tensor_class
    assert TENSOR_CLASSES[kind] == "attention"


SIZES = st.integers(0, 3 * PAGE_BYTES) | st.sampled_from([0, 1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1])


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(NAMES), SIZES), max_size=8))
def test_classes_are_those_of_a_count_byte_by_byte(parts: list[tuple[int, str, int]]) -> None:
    tensors, ends = [], [0, 0, 0]
    for segment, name, nbytes in parts:
        tensors.append(TensorInfo(name, "U8", (nbytes,), 0, 0, Extent(segment, ends[segment], nbytes)))
        ends[segment] += nbytes + 4096
    segments = tuple(SegmentInfo(f"layers.{i}", max(end, 1)) for i, end in enumerate(ends))
    facts = page_facts_of(Manifest("/weights", "id", (), segments, tuple(tensors)))
    counts = np.zeros((len(facts.segment), len(TENSOR_CLASSES)), np.int64)
    for tensor in tensors:
        first = sum(info.pages for info in segments[: tensor.extent.segment])
        for page in range(segments[tensor.extent.segment].pages):
            low = max(tensor.extent.offset, page * PAGE_BYTES)
            high = min(tensor.extent.offset + tensor.extent.length, (page + 1) * PAGE_BYTES)
            counts[first + page, tensor_class_of(tensor.name)] += max(0, high - low)
    assert facts.tensor_class.tolist() == counts.argmax(axis=1).tolist()
