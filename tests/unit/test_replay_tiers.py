"""The tier model: what a tier may be said to be, and how load slows it."""

from __future__ import annotations

import pytest

from tiermem.errors import ConfigError
from tiermem.replay.tier_model import TierModel, parse_tier_models, tiers_of
from tiermem.types import PAGE_BYTES

GIB = 1 << 30


def test_sizes_are_bytes_parts_or_the_rest() -> None:
    fast, slow = parse_tier_models(("dram=1/4,cxl=rest",), 16 * GIB)
    assert (fast.capacity_bytes, slow.capacity_bytes) == (4 * GIB, 16 * GIB)
    assert (fast.idle_latency_s, fast.bandwidth_bytes_s) == (90e-9, 100e9)
    fast, slow = parse_tier_models(("dram=1GiB:80ns:200GB/s", "cxl=16GiB::20GB/s".replace("::", ":300ns:")), 16 * GIB)
    assert (fast.capacity_bytes, fast.idle_latency_s, fast.bandwidth_bytes_s) == (GIB, pytest.approx(80e-9), 200e9)
    assert (slow.idle_latency_s, slow.bandwidth_bytes_s) == (pytest.approx(300e-9), 20e9)
    assert parse_tier_models(("dram=rest:50GB/s",), GIB)[0].bandwidth_bytes_s == 50e9


def test_capacities_are_whole_pages() -> None:
    assert parse_tier_models(("dram=1/3,cxl=rest",), 10 * PAGE_BYTES)[0].capacity_bytes == 3 * PAGE_BYTES


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("dram", "is no tier"), ("hbm=1GiB,dram=rest", "is no tier"), ("dram=1/0,cxl=rest", "write a size"),
        ("dram=huge", "write a size"), ("dram=1/4", "cannot hold"), ("dram=1/4,cxl=1/4", "cannot hold"),
        ("cxl=rest", "one dram"), ("cxl=rest,dram=1/4", "one dram"), ("dram=rest,dram=rest", "one dram"),
        ("dram=0/4,cxl=rest", "above 0"), ("dram=1GiB:0ns,cxl=rest", "above 0"), ("dram=1GiB:9.9.9ns,cxl=rest", "size"),
        ("dram=1GiB,cxl=rest:25GB", "is no tier"), ("", "is no tier"), ("dram=-1/4,cxl=rest", "above 0"),
    ],
)  # fmt: skip
def test_what_is_no_tier_is_named(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_tier_models((text,), 16 * GIB)


def test_latency_rises_with_load_and_never_falls() -> None:
    tier = TierModel("dram", GIB, 100e-9, 100e9)
    assert tier.latency_s(0) == pytest.approx(100e-9)
    assert tier.latency_s(50e9) == pytest.approx(150e-9)
    latencies = [tier.latency_s(load * 1e9) for load in range(0, 300, 5)]
    assert latencies == sorted(latencies)
    assert tier.latency_s(190e9) == pytest.approx(2 * tier.latency_s(95e9))


def test_moves_leave_a_tenth_of_the_bandwidth_to_reads() -> None:
    tier = TierModel("dram", GIB, 100e-9, 100e9)
    assert tier.read_s(100 * 10**9, 0) == pytest.approx(1.0)
    assert tier.read_s(100 * 10**9, 50e9) == pytest.approx(2.0)
    assert tier.read_s(100 * 10**9, 500e9) == pytest.approx(10.0)


def test_the_pools_tiers_end_with_a_disk() -> None:
    tiers = tiers_of(parse_tier_models(("dram=1/4,cxl=rest",), GIB))
    assert [(tier.id, tier.name, tier.is_memory) for tier in tiers] == [
        (0, "dram", True), (1, "cxl", True), (2, "disk", False)]  # fmt: skip
