"""The view: a true, frozen copy of the pool's state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.unit.test_catalog import manifest_of
from tiermem.catalog import ModelRecord
from tiermem.policy import View
from tiermem.tier import DISK, DRAM, Tier
from tiermem.types import LOADING, PAGE_BYTES
from tiermem.view import Place, view_of


def record_of(name: str, file: int, pages: list[int]) -> ModelRecord:
    manifest = manifest_of([file], pages)
    return ModelRecord(name, manifest, [None] * len(manifest.tensors))


@pytest.fixture
def records() -> list[ModelRecord]:
    """Two models; of the first, segment 0 (2 pages) is in memory and segment 1 (1 page) on its way."""
    first, second = record_of("first", 0, [2, 1]), record_of("second", 1, [3])
    first.begin(0, "a")
    first.complete(0)
    first.begin(1, "b")
    first.last_used_s[:] = (5.0, 6.0)
    second.pins = 1
    return [first, second]


def view(records: list[ModelRecord], leased: str = "") -> tuple[View, dict[int, Place]]:
    tiers = (Tier(DRAM, "dram", 10 * PAGE_BYTES), Tier(DISK, "disk", None))
    tiers[0].reserve(3 * PAGE_BYTES)
    return view_of(records, lambda record: record.name == leased, tiers, {DRAM: 77}, 9.5)


def test_every_column_is_right(records: list[ModelRecord]) -> None:
    seen, places = view(records, leased="first")
    assert seen.now_s == 9.5
    assert seen.models == ("first", "second")
    assert seen.pages.model.tolist() == [0, 0, 0, 1, 1, 1]
    assert seen.pages.segment.tolist() == [0, 0, 1, 0, 0, 0]
    assert seen.pages.tier.tolist() == [DRAM, DRAM, LOADING, DISK, DISK, DISK]
    assert seen.pages.last_used_s.tolist() == [5.0, 5.0, 6.0, 0.0, 0.0, 0.0]
    assert seen.pages.leased.tolist() == [True] * 3 + [False] * 3
    assert seen.pages.pinned.tolist() == [False] * 3 + [True] * 3
    assert places == {0: (records[0], 0), 2: (records[0], 1), 3: (records[1], 0)}
    assert [dataclasses.astuple(tier) for tier in seen.tiers] == [
        (DRAM, "dram", 10 * PAGE_BYTES, 3 * PAGE_BYTES, 77), (DISK, "disk", None, 0, 0)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_of_it_can_be_written(records: list[ModelRecord], count: int) -> None:
    seen, _ = view(records[:count])
    for column in dataclasses.fields(seen.pages):
        array = getattr(seen.pages, column.name)
        assert len(array) == 3 * count
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.now_s = 1.0  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.tiers[0].needed_bytes = 1  # type: ignore[misc]


def test_it_stays_as_it_was_when_the_pool_goes_on(records: list[ModelRecord]) -> None:
    seen, _ = view(records)
    before = seen.pages.tier.copy()
    records[0].ready[:] = True
    records[0].complete(1)
    records[0].drop(0)
    records[0].last_used_s[:] = 99.0
    assert np.array_equal(seen.pages.tier, before)
    assert seen.pages.last_used_s.max() == 6.0
