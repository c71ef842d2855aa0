"""Tiers: what is counted never exceeds what there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import CapacityError
from tiermem.tier import DISK, DRAM, Tier


@given(st.integers(0, 100), st.lists(st.integers(-60, 60)))
def test_a_tier_is_never_fuller_than_its_capacity(capacity: int, changes: list[int]) -> None:
    tier, used = Tier(DRAM, "dram", capacity), 0
    for change in changes:
        if change < 0:
            change = -min(used, -change)
            tier.release(-change)
            used += change
        elif used + change > capacity:
            assert tier.lacks(change) == used + change - capacity
            with pytest.raises(CapacityError):
                tier.reserve(change)
        else:
            assert tier.lacks(change) == 0
            tier.reserve(change)
            used += change
        assert tier.used_bytes == used <= capacity
        assert tier.free_bytes == capacity - used


def test_a_tier_without_a_capacity_takes_everything() -> None:
    tier = Tier(DISK, "disk", None)
    tier.reserve(1 << 60)
    assert tier.lacks(1 << 62) == 0
    assert tier.free_bytes is None


def test_a_full_tier_says_how_much_it_lacks_and_what_to_do() -> None:
    tier = Tier(DRAM, "dram", 8 << 20)
    tier.reserve(6 << 20)
    with pytest.raises(CapacityError, match=r"'dram' needs 4\.0 MiB, has 2\.0 MiB free of 8\.0 MiB; unload .*--dram"):
        tier.reserve(4 << 20)
    assert tier.used_bytes == 6 << 20


def test_releasing_more_than_was_reserved_is_a_bug() -> None:
    tier = Tier(DRAM, "dram", 8)
    tier.reserve(4)
    with pytest.raises(AssertionError):
        tier.release(5)
