"""The pool's orders for a device: pages come and go as the tensors that lie on them, and what is held stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ConfigMaker
from tests.unit.nets import opened
from tiermem.carrier import Carrier
from tiermem.device import open_device
from tiermem.device.overlap import Overlap
from tiermem.errors import Closed, DeviceFull
from tiermem.model import Model
from tiermem.types import PAGE_BYTES, Extent, Manifest, SegmentInfo, TensorInfo

MIB = 1 << 20


class Linked:
    """A link to a pool that only listens."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.told = 0
        self.closed = False

    def changed(self) -> None:
        self.told += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def layered(config: ConfigMaker, tmp_path: Path) -> Iterator[Model]:
    """Two layers: one of 5 MiB in two tensors that share a page, and one of a small tensor and one without bytes."""
    weights = {
        "layers.0.a": torch.full((3 * MIB,), 1, dtype=torch.uint8),
        "layers.0.b": torch.full((2 * MIB,), 2, dtype=torch.uint8),
        "layers.1.c": torch.full((100,), 3, dtype=torch.uint8),
        "layers.1.none": torch.empty(0, dtype=torch.uint8),
    }
    with opened(config, tmp_path / "model.safetensors", weights) as model:
        yield model


def test_the_pool_orders_pages_and_gets_tensors(layered: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    links = list[Linked]()
    monkeypatch.setattr(layered._holder, "carry", lambda carrier: links.append(Linked(carrier)) or links[-1])
    layered.wait()
    with layered.stream("cpu", 8 * MIB) as on:
        (link,) = links
        carrier = link.carrier
        assert (carrier.device, carrier.budget_bytes) == ("cpu", 8 * MIB)
        assert carrier.capacity_bytes == open_device("cpu").capacity_bytes()
        assert carrier.replicas().tolist() == [False] * 4
        carrier.copy(0, range(2, 3))
        assert carrier.replicas().tolist() == [False, False, True, False], "page 1 has bytes of another tensor"
        assert carrier.take_copied().tolist() == [1, 2]
        assert carrier.take_copied().tolist() == []
        carrier.copy(0, range(0, 1))
        carrier.copy(1, range(0, 1))
        assert carrier.replicas().all()
        assert carrier.take_copied().tolist() == [0, 1, 3]
        told = link.told
        assert told > 0
        on["layers.0.b"]
        carrier.drop(0, range(0, 3))
        assert carrier.replicas().tolist() == [False, False, True, True], "what somebody holds stays"
        assert link.told > told
        on.release(["layers.0.b"])
        carrier.drop(0, range(1, 2))
        assert carrier.replicas().tolist() == [False, False, False, True]
        on.residency.check()
        assert not link.closed
    assert link.closed
    assert not carrier.replicas().any()
    with pytest.raises(Closed):
        carrier.copy(0, range(1))


@given(
    st.lists(st.lists(st.integers(0, 5 * MIB), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 1 << 20),
)
def test_tensors_and_pages_overlap(layers: list[list[int]], present_bits: int) -> None:
    infos, segments, on_page = list[TensorInfo](), list[SegmentInfo](), dict[tuple[int, int], set[int]]()
    for segment, sizes in enumerate(layers):
        offset = 0
        for nbytes in sizes:
            number = len(infos)
            infos.append(TensorInfo(str(number), "U8", (nbytes,), 0, 0, Extent(segment, offset, nbytes)))
            for page in {
                at // PAGE_BYTES for at in (*range(offset, offset + nbytes, 4096), offset + nbytes - 1) if nbytes
            }:
                on_page.setdefault((segment, page), set()).add(number)
            offset += -(-nbytes // 4096) * 4096
        segments.append(SegmentInfo(str(segment), offset))
    overlap = Overlap(Manifest("", "", (), tuple(segments), tuple(infos)))
    places = [(number, page) for number, segment in enumerate(segments) for page in range(segment.pages)]
    assert overlap.pages == len(places)
    present = np.array([bool(present_bits >> number & 1) for number in range(len(infos))])
    assert overlap.whole(present).tolist() == [
        all(present[number] for number in on_page.get(place, ())) for place in places
    ]
    for row, (segment, page) in enumerate(places):
        tensors = overlap.tensors_on(segment, range(page, page + 1))
        assert set(tensors) == on_page.get((segment, page), set())
        assert all(row in overlap.pages_of([number]) for number in tensors)


def test_what_the_pool_ordered_goes_last(layered: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    links = list[Linked]()
    monkeypatch.setattr(layered._holder, "carry", lambda carrier: links.append(Linked(carrier)) or links[-1])
    with layered.stream("cpu", 4 * MIB) as on:
        links[0].carrier.copy(1, range(0, 1))
        on["layers.0.b"]
        on.release(["layers.0.b"])
        on["layers.0.a"]
        on.release(["layers.0.a"])
        assert links[0].carrier.replicas().tolist() == [True, False, False, True]
        with pytest.raises(DeviceFull):
            links[0].carrier.copy(0, range(3))
        assert links[0].carrier.replicas().tolist() == [True, False, False, True]
        links[0].carrier.drop(1, range(0, 1))
        for name in ("layers.1.c", "layers.0.a", "layers.0.b"):
            on[name]
            on.release([name])
        assert not links[0].carrier.replicas()[3], "given up once, it is as any other"
