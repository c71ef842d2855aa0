"""Tiers: what is reserved never exceeds what there is, and a host without what they need is refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_catalog import CXL, DISK, DRAM
from tiermem.errors import CapacityError, ConfigError
from tiermem.host import NumaNode
from tiermem.policy.view import UNBOUNDED
from tiermem.tier import Tier, open_tiers
from tiermem.tier_spec import parse_tiers
from tiermem.types import PAGE_BYTES

GIB = 1 << 30
ONE = (NumaNode(0, "0-7", 8 * GIB, 4 * GIB),)
TWO = (*ONE, NumaNode(1, "8-15", 8 * GIB, 4 * GIB))
CXL_HOST = (*ONE, NumaNode(1, "", 16 * GIB, 16 * GIB))
LARGE = (*TWO, NumaNode(2, "", 16 * GIB, GIB), NumaNode(3, "", 16 * GIB, GIB), NumaNode(4, "", 0, 0))


@given(st.integers(0, 100), st.lists(st.integers(-60, 60)))
def test_a_tier_is_never_fuller_than_its_capacity(capacity: int, changes: list[int]) -> None:
    tier, used = Tier(DRAM, "dram", capacity), 0
    for change in changes:
        if change < 0:
            change = -min(used, -change)
            tier.count(change)
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
    assert tier.view().free_bytes == UNBOUNDED


def test_a_full_tier_says_how_much_it_lacks_and_what_to_do() -> None:
    tier = Tier(DRAM, "dram", 8 << 20)
    tier.reserve(6 << 20)
    with pytest.raises(CapacityError, match=r"'dram' needs 4\.0 MiB, has 2\.0 MiB free of 8\.0 MiB; unload .*--tier"):
        tier.reserve(4 << 20)
    assert tier.used_bytes == 6 << 20


def test_what_is_there_is_counted_even_if_it_is_too_much() -> None:
    tier = Tier(DRAM, "dram", 8 << 20)
    tier.count(10 << 20)
    assert (tier.used_bytes, tier.free_bytes, tier.lacks(1)) == (10 << 20, 0, 1)


def test_giving_back_more_than_was_counted_is_a_bug() -> None:
    tier = Tier(DRAM, "dram", 8)
    tier.reserve(4)
    with pytest.raises(AssertionError, match="tier dram released more than it had"):
        tier.count(-5)


def test_a_tier_that_is_offline_is_full() -> None:
    tier = Tier(CXL, "cxl", 8 * PAGE_BYTES, [1])
    tier.reserve(2 * PAGE_BYTES)
    assert tier.view().free_bytes == 6 * PAGE_BYTES
    tier.online = False
    assert (tier.free_bytes, tier.view().free_bytes, tier.view().used_bytes) == (0, 0, 2 * PAGE_BYTES)
    with pytest.raises(CapacityError):
        tier.reserve(1)


@pytest.mark.parametrize(
    ("capacity", "low", "high"),
    [(10 * PAGE_BYTES, 0, 0), (100 * PAGE_BYTES, 2 * PAGE_BYTES, 3 * PAGE_BYTES), (1 << 40, 1000 << 20, 1500 << 20)],
)
def test_watermarks_are_a_part_of_a_small_tier_and_bounded_in_a_large_one(capacity: int, low: int, high: int) -> None:
    seen = Tier(DRAM, "dram", capacity).view()
    assert (seen.low_bytes, seen.high_bytes) == (low, high)


def test_a_view_of_a_tier_tells_all_that_was_measured() -> None:
    tier = Tier(CXL, "cxl", 8 * PAGE_BYTES, [1, 3])
    seen = tier.view()
    assert all(map(math.isnan, (seen.idle_latency_s, seen.latency_s, seen.bandwidth_bytes_s, seen.load)))
    tier.speed.idle_latency_s, tier.speed.latency_s, tier.speed.bandwidth_bytes_s = 1.0, 2.0, 3.0
    seen = tier.view(0.5)
    assert (seen.idle_latency_s, seen.latency_s, seen.bandwidth_bytes_s, seen.load) == (1.0, 2.0, 3.0, 0.5)
    assert (seen.id, seen.name, seen.kind, seen.is_memory, tier.node_mask) == (CXL, "cxl", "cxl", True, 0b1010)


@pytest.mark.parametrize(
    ("text", "nodes", "wanted"),
    [
        ("dram=1GiB", (), [()]),
        ("dram=1GiB", ONE, [()]),
        ("dram=1GiB", TWO, [()]),
        ("dram=1GiB", CXL_HOST, [(0,)]),
        ("dram=1GiB", LARGE, [(0, 1)]),
        ("dram=1GiB@node1", TWO, [(1,)]),
        ("dram=1GiB,cxl=1GiB", CXL_HOST, [(0,), (1,)]),
        ("dram=1GiB,cxl=1GiB", LARGE, [(0, 1), (2, 3)]),
        ("dram=1GiB@node1,cxl=1GiB@node3", LARGE, [(1,), (3,)]),
    ],
)
def test_where_tiers_are(text: str, nodes: tuple[NumaNode, ...], wanted: list[tuple[int, ...]]) -> None:
    tiers = open_tiers(parse_tiers(text), nodes)
    assert [tier.id for tier in tiers] == list(range(len(tiers)))
    assert [tier.nodes for tier in tiers.memory] == wanted
    assert (tiers[tiers.disk].kind, tiers[tiers.disk].nodes) == ("disk", ())
    assert tiers.several == (len(wanted) == 2)
    assert tiers.capacity_bytes == tiers.free_bytes == len(wanted) * GIB


def test_devices_come_first_and_take_no_pages() -> None:
    tiers = open_tiers(parse_tiers("hbm=1GiB@npu:0,hbm@cpu,dram=1GiB"), ONE)
    assert [(tier.id, tier.name, tier.kind, tier.device) for tier in tiers] == [
        (0, "hbm@npu:0", "hbm", "npu:0"), (1, "hbm@cpu", "hbm", "cpu"), (2, "dram", "dram", ""), (3, "disk", "disk", "")
    ]  # fmt: skip
    assert (list(tiers.devices), list(tiers.memory)) == (list(tiers[:2]), [tiers[2]])
    assert [tier.capacity_bytes for tier in tiers.devices] == [GIB, 0], "the second is as large as its device"
    assert (tiers.steered, tiers.several, tiers.capacity_bytes, tiers.disk) == (True, False, GIB, 3)
    assert not open_tiers(parse_tiers("dram=1GiB"), ONE).steered


def test_memory_of_a_node_that_is_in_no_tier_counts_in_the_slowest() -> None:
    tiers = open_tiers(parse_tiers("dram=1GiB@node1,cxl=1GiB@node3"), LARGE)
    assert [tiers.of_node(node) for node in range(5)] == [CXL, DRAM, CXL, CXL, CXL]
    assert open_tiers(parse_tiers("dram=1GiB"), ONE).of_node(7) == DRAM


@pytest.mark.parametrize(
    ("text", "nodes", "words"),
    [
        ("dram=1GiB,cxl=1GiB", (), "no memory-only NUMA node.*daxctl reconfigure-device"),
        ("dram=1GiB,cxl=1GiB", ONE, "no memory-only NUMA node.*daxctl reconfigure-device"),
        ("dram=1GiB,cxl=1GiB@node1", TWO, "no memory-only NUMA node.*daxctl reconfigure-device"),
        ("dram=1GiB,cxl=1GiB@node7", CXL_HOST, "no node7; it has node0, node1.*daxctl reconfigure-device"),
        ("dram=1GiB@node7", ONE, "no node7; it has node0.*daxctl"),
        ("dram=1GiB@node0", (), "no node0; it has none"),
        ("dram=1GiB,cxl=1GiB@node1", LARGE, "node1 has CPUs or no memory.*memory-only nodes are node2, node3.*daxctl"),
        ("dram=1GiB,cxl=1GiB@node4", LARGE, "node4 has CPUs or no memory.*daxctl"),
        ("dram=1GiB@node1,cxl=1GiB@node1", CXL_HOST, "two tiers name the same NUMA node"),
    ],
)
def test_a_host_without_what_the_tiers_need_is_refused(text: str, nodes: tuple[NumaNode, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_tiers(parse_tiers(text), nodes)
