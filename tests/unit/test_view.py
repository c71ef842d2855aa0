"""The view: a true, frozen copy of the pool's state, and rows that find their pages again."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_catalog import CXL, DISK, DRAM, begin, fill, record_of
from tests.unit.tiers_bench import tiers_of
from tiermem.catalog import Catalog, ModelRecord
from tiermem.heat import Heat
from tiermem.observations import Bits, Rung
from tiermem.pins import Pins
from tiermem.policy import PAGE_DTYPES, View
from tiermem.types import LOADING, PAGE_BYTES, TENSOR_CLASSES
from tiermem.view import Rows, Views


class Pool:
    """Two models; of `first`, segment 0 is in DRAM and CXL memory and segment 1 on its way, `second` is on disk."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.first, self.second = record_of("first", [0], [2, 1]), record_of("second", [1], [3])
        self.leased: set[str] = {"first"}
        self.heats: dict[str, Heat] = {}
        self.tiers = tiers_of(10, 20)
        for record in (self.first, self.second):
            self.catalog.add(record)
            self.heats[record.name] = Heat(record.first_page[-1])
        begin(self.first, 0, tiers=(DRAM, CXL))
        fill(self.first, 0)
        begin(self.first, 1)
        self.first.last_used_s[:] = (5.0, 6.0)
        self.first.replicas[1] = 0b1000
        self.first.opens, self.second.pins = 3, 1
        self.tiers[DRAM].reserve(2 * PAGE_BYTES)
        self.tiers[CXL].reserve(PAGE_BYTES)
        self.pins = Pins()
        self.views = Views(
            self.tiers,
            lambda record: self.heats[record.name],
            lambda record: record.name in self.leased,
            self.pins.pages,
        )

    def view(self, now_s: float = 9.5) -> tuple[View, Rows]:
        return self.views.view(self.catalog, now_s, 77, 88, 2.5)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def touch(heat: Heat, touched: list[bool], end_s: float) -> None:
    heat.add_bits(Bits(Rung.PRESENT, end_s - 1, end_s, np.arange(heat.pages, dtype=np.int32), np.array(touched)))


def assert_close(found: npt.NDArray[Any], wanted: list[float]) -> None:
    np.testing.assert_allclose(found, np.array(wanted))


def test_every_column_is_right(pool: Pool) -> None:
    touch(pool.heats["first"], [True, False, True], 8.0)
    seen, _ = pool.view()
    assert (seen.now_s, seen.needed_bytes, seen.quota_bytes, seen.period_s) == (9.5, 77, 88, 2.5)
    pages = seen.pages
    assert {name: getattr(pages, name).dtype for name in PAGE_DTYPES} == PAGE_DTYPES
    assert pages.id.tolist() == [0, 1, 2, 3, 4, 5]
    assert pages.model.tolist() == [0, 0, 0, 1, 1, 1]
    assert pages.segment.tolist() == pages.layer.tolist() == [0, 0, 1, 0, 0, 0]
    assert pages.order.tolist() == [0, 1, 2, 0, 1, 2]
    assert {TENSOR_CLASSES[kind] for kind in pages.tensor_class} == {"other"}
    assert pages.tier.tolist() == [DRAM, CXL, LOADING, DISK, DISK, DISK]
    assert pages.replicas.tolist() == [0, 8, 0, 0, 0, 0]
    assert pages.last_used_s.tolist() == [5.0, 5.0, 6.0, 0.0, 0.0, 0.0]
    assert pages.leased.tolist() == [True] * 3 + [False] * 3
    assert pages.pinned.tolist() == [False] * 3 + [True] * 3
    assert pages.known.tolist() == [True] * 3 + [False] * 3
    assert pages.observed.tolist() == [1, 0, 1, 0, 0, 0]
    assert pages.rung.tolist() == [Rung.PRESENT] * 3 + [Rung.NONE] * 3
    assert (pages.rate[0] > 0, pages.rate[1]) == (True, 0.0)
    assert_close(pages.age_s, [1.5, np.nan, 1.5, np.nan, np.nan, np.nan])
    assert_close(pages.last_seen_s, [8.0, np.nan, 8.0, np.nan, np.nan, np.nan])
    assert_close(pages.sampled_age_s, [1.5] * 3 + [np.nan] * 3)
    assert np.isnan(pages.rate[3:]).all()


def test_models_and_tiers_are_right(pool: Pool) -> None:
    touch(pool.heats["first"], [True, True, False], 9.0)
    pool.tiers[CXL].speed.bandwidth_bytes_s = 1e9
    seen, _ = pool.view()
    models = seen.models
    assert models.name == ("first", "second")
    assert models.nbytes.tolist() == [pool.first.manifest.nbytes, pool.second.manifest.nbytes]
    assert models.opens.tolist() == [3, 0]
    np.testing.assert_array_equal(models.last_open_s, [6.0, np.nan])
    assert_close(models.rate, [float(np.nansum(seen.pages.rate[:3])), 0.0])
    assert [(t.id, t.name, t.capacity_bytes, t.used_bytes) for t in seen.tiers] == [
        (DRAM, "dram", 10 * PAGE_BYTES, 2 * PAGE_BYTES), (CXL, "cxl", 20 * PAGE_BYTES, PAGE_BYTES),
        (DISK, "disk", None, 0),
    ]  # fmt: skip
    assert seen.tiers[CXL].load == pytest.approx(float(seen.pages.rate[1]) * PAGE_BYTES / 1e9)
    assert np.isnan(seen.tiers[DRAM].load), "nobody measured its bandwidth"
    assert [tier.id for tier in seen.memory_tiers] == [DRAM, CXL]


@pytest.mark.parametrize("models", [0, 2])
def test_nothing_of_it_can_be_written(pool: Pool, models: int) -> None:
    seen, _ = pool.views.view(list(pool.catalog)[:models], 9.5)
    columns = [getattr(seen.pages, name) for name in PAGE_DTYPES]
    assert [len(column) for column in columns] == [3 * models] * len(columns)
    assert len(seen.models) == models
    columns += [seen.models.nbytes, seen.models.opens, seen.models.last_open_s, seen.models.rate]
    for column in columns:
        with pytest.raises(ValueError, match="read-only"):
            column[:] = 0
    for frozen, name in ((seen, "now_s"), (seen.pages, "tier"), (seen.models, "opens"), (seen.tiers[0], "used_bytes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 1)


def test_it_stays_as_it_was_when_the_pool_goes_on(pool: Pool) -> None:
    touch(pool.heats["first"], [True, True, False], 9.0)
    seen, _ = pool.view()
    before = {name: getattr(seen.pages, name).copy() for name in PAGE_DTYPES}
    opens, tiers = seen.models.opens.copy(), seen.tiers
    fill(pool.first, 1)
    pool.first.drop(0)
    pool.first.last_used_s[:] = 99.0
    pool.first.replicas[:] = 7
    pool.first.opens, pool.first.pins, pool.leased = 9, 9, {"second"}
    pool.tiers[DRAM].count(PAGE_BYTES)
    touch(pool.heats["first"], [True, True, True], 10.0)
    for name, column in before.items():
        np.testing.assert_array_equal(getattr(seen.pages, name), column)
    assert seen.models.opens.tolist() == opens.tolist()
    assert seen.tiers == tiers
    assert tiers[DRAM].used_bytes == 2 * PAGE_BYTES


def test_ids_of_pages_stay_while_models_come_and_go(pool: Pool) -> None:
    pool.catalog.remove(pool.first)
    third = record_of("third", [2], [2])
    pool.heats["third"] = Heat(2)
    pool.catalog.add(third)
    seen, rows = pool.view()
    assert seen.pages.id.tolist() == [3, 4, 5, 6, 7]
    assert seen.pages.model.tolist() == [0, 0, 0, 1, 1]
    assert [piece.record for piece in rows.pieces(0, 5)] == [pool.second, third]


def test_a_request_is_of_the_segments_that_ask(pool: Pool) -> None:
    request = pool.views.request(pool.first, [1], 4.0)
    assert (request.now_s, request.model, len(request)) == (4.0, "first", 1)
    assert (request.segment.tolist(), request.order.tolist()) == ([1], [2])
    whole = pool.views.request(pool.first, [0, 1], 4.0)
    assert (whole.segment.tolist(), whole.layer.tolist(), whole.order.tolist()) == ([0, 0, 1], [0, 0, 1], [0, 1, 2])
    assert [tier.free_bytes for tier in whole.tiers[:2]] == [8 * PAGE_BYTES, 19 * PAGE_BYTES]
    for name in ("segment", "layer", "order", "tensor_class"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(whole, name)[:] = 0


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_pieces_are_what_a_walk_over_all_pages_finds(models: list[list[int]], data: st.DataObject) -> None:
    records: list[ModelRecord] = [record_of(str(i), [i], pages) for i, pages in enumerate(models)]
    walk = [
        (record, segment, page)
        for record in records
        for segment, info in enumerate(record.manifest.segments)
        for page in range(info.pages)
    ]
    first = data.draw(st.integers(0, len(walk)))
    count = data.draw(st.integers(0, len(walk) - first))
    pieces = list(Rows(records).pieces(first, count))
    assert [(p.record, p.segment, page) for p in pieces for page in p.pages] == walk[first : first + count]
    assert all(len(piece.pages) for piece in pieces)
    assert len(pieces) == len({(id(p.record), p.segment) for p in pieces}), "as few as there are segments"
    for piece in pieces:
        base = piece.record.first_page[piece.segment]
        assert piece.rows == slice(base + piece.pages.start, base + piece.pages.stop)


def test_pages_that_a_device_reads_stay_where_they_are(pool: Pool) -> None:
    assert not pool.view()[0].pages.pinned[: pool.first.first_page[-1]].any()
    pool.pins.mark(str(pool.first.keys[1]), True)
    view, _ = pool.view()
    assert view.pages.pinned[: pool.first.first_page[-1]].tolist() == [
        segment == 1 for segment in (0, 1) for _ in range(pool.first.manifest.segments[segment].pages)
    ]
    pool.pins.mark(str(pool.first.keys[1]), False)
    assert not pool.view()[0].pages.pinned[: pool.first.first_page[-1]].any()
