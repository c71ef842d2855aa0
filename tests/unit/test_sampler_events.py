"""Which events sample data addresses, read from trees of /sys as kernels show them."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit import pmus
from tiermem import samples
from tiermem.errors import ConfigError
from tiermem.sampler import events, sysfs

LARGE_PEBS = (
    samples.IP | samples.TID | samples.TIME | samples.ADDR | samples.ID | samples.CPU | samples.STREAM_ID
    | samples.DATA_SRC | samples.IDENTIFIER | samples.TRANSACTION | samples.PHYS_ADDR | samples.PERIOD
    | samples.CODE_PAGE_SIZE | samples.WEIGHT | samples.WEIGHT_STRUCT
)  # fmt: skip
"""Columns with which the kernel lets the hardware write many records at one interrupt (intel_pmu_large_pebs_flags)."""


def only(root: Path, tree: dict[str, str], name: str) -> events.NamedEvent:
    (part,) = events.hardware(pmus.plant(root, tree))[name]
    return part


def test_skylake_streams_by_all_loads(tmp_path: Path) -> None:
    found = events.hardware(pmus.plant(tmp_path, pmus.SKYLAKE))
    assert list(found) == ["all-loads", "mem-loads", "l3-miss"]
    loads, latency, misses = (found[name][0] for name in found)
    assert (loads.event.type, loads.event.config, loads.event.precise) == (4, 0x81D0, 2)
    assert (loads.event.period, loads.leader, loads.cpus) == (1_000_003, None, None)
    assert (latency.event.config, latency.event.config1, latency.leader) == (0x1CD, 3, None)
    assert misses.event.config == 0x20D1
    # Linux 5.4 knows no WEIGHT_STRUCT.
    assert loads.event.sample_type & samples.WEIGHT
    assert not loads.event.sample_type & samples.WEIGHT_STRUCT


@pytest.mark.parametrize("tree", [pmus.SKYLAKE, pmus.SAPPHIRE_RAPIDS, pmus.ALDER_LAKE])
def test_pebs_keeps_its_multi_record_mode(tmp_path: Path, tree: dict[str, str]) -> None:
    for parts in events.hardware(pmus.plant(tmp_path, tree)).values():
        for part in parts:
            assert part.event.sample_type & samples.ADDR
            assert part.event.sample_type & ~LARGE_PEBS == 0
            assert not part.event.monotonic
            assert part.event.exclude_kernel


def test_sapphire_rapids_leads_latency_by_aux(tmp_path: Path) -> None:
    latency = only(tmp_path, pmus.SAPPHIRE_RAPIDS, "mem-loads")
    assert latency.leader is not None
    assert (latency.leader.config, latency.leader.period, latency.leader.sample_type) == (0x8203, 0, 0)
    loads = only(tmp_path, pmus.SAPPHIRE_RAPIDS, "all-loads")
    assert loads.leader is None
    assert loads.event.sample_type & samples.WEIGHT_STRUCT


def test_hybrid_cores_have_one_part_each(tmp_path: Path) -> None:
    found = events.hardware(pmus.plant(tmp_path, pmus.ALDER_LAKE))
    parts = {part.cpus: part for part in found["mem-loads"]}
    big, small = parts[0, 1, 2, 3], parts[4, 5]
    assert (big.event.type, big.event.config, big.leader is not None) == (4, 0x1CD, True)
    assert (small.event.type, small.event.config, small.leader) == (10, 0x5D0, None)
    assert {part.event.type for part in found["all-loads"]} == {4, 10}
    assert [part.event.type for part in found["l3-miss"]] == [4]  # the small cores' has no address


def test_a_unit_without_precise_events_samples_nothing(tmp_path: Path) -> None:
    assert events.hardware(pmus.plant(tmp_path, pmus.VIRTUAL)) == {}
    assert events.hardware(tmp_path / "absent") == {}


def test_zen3_cannot_leave_the_kernel_out(tmp_path: Path) -> None:
    root = pmus.plant(tmp_path, pmus.ZEN3)
    assert list(events.hardware(root)) == ["ibs-op"]
    (op,) = events.hardware(root)["ibs-op"]
    assert (op.event.type, op.event.config, op.event.config2) == (9, 1 << 19, 0)
    assert not op.event.exclude_kernel
    assert op.user_only
    assert op.whole_host_only  # Linux 5.15


def test_zen4_samples_misses_alone(tmp_path: Path) -> None:
    found = events.hardware(pmus.plant(tmp_path, pmus.ZEN4))
    assert list(found) == ["ibs-op", "ibs-l3miss"]
    (misses,) = found["ibs-l3miss"]
    assert misses.event.config == 1 << 19 | 1 << 16
    assert not misses.whole_host_only
    assert misses.event.period < found["ibs-op"][0].event.period


def test_ibs_filters_in_software_where_the_kernel_can(tmp_path: Path) -> None:
    op = only(tmp_path, pmus.ZEN5, "ibs-op")
    assert (op.event.config2, op.event.exclude_kernel, op.user_only) == (1, True, False)


@pytest.mark.parametrize("tree", [pmus.ZEN3, pmus.ZEN4, pmus.ZEN5])
def test_ibs_periods_fit_the_counter(tmp_path: Path, tree: dict[str, str]) -> None:
    for (part,) in events.hardware(pmus.plant(tmp_path, tree)).values():
        for ring in range(300):
            assert part.nth(ring).period % 16 == 0
            assert part.nth(ring).period <= 0xFFFF0


def test_kunpeng_profiles_loads_into_an_aux_area(tmp_path: Path) -> None:
    spe = only(tmp_path, pmus.KUNPENG, "spe-loads")
    assert (spe.event.type, spe.event.config) == (7, 1 | 1 << 16 | 1 << 33)
    assert spe.event.period % 256 == 0
    assert spe.aux_bytes >= 8192
    assert spe.aux_bytes & (spe.aux_bytes - 1) == 0
    assert spe.cpus == tuple(range(8))


def test_spe_interval_is_at_least_the_least(tmp_path: Path) -> None:
    tree = pmus.KUNPENG | {f"{pmus.DEVICES}/arm_spe_0/caps/min_interval": "131072\n"}
    assert only(tmp_path, tree, "spe-loads").event.period == 131072


def test_each_ring_has_its_own_prime(tmp_path: Path) -> None:
    loads = only(tmp_path, pmus.SKYLAKE, "all-loads")
    periods = [loads.nth(ring).period for ring in range(64)]
    assert periods[0] == 1_000_003
    assert len(set(periods)) == 64
    assert max(periods) < 1_002_000
    assert all(period % divisor for period in periods for divisor in range(2, 1002))
    assert loads.every(100_000).nth(0).period == 100_003


def test_faults_count_each_one(tmp_path: Path) -> None:
    minor, major = events.faults()
    assert (minor.event.config, major.event.config) == (5, 6)
    assert minor.nth(7) == minor.event
    assert minor.event.exclude_kernel
    assert not events.faults(kernel=True)[0].event.exclude_kernel
    assert (minor.event.period, minor.event.monotonic) == (1, True)


def test_terms_go_to_the_bits_that_sysfs_names(tmp_path: Path) -> None:
    files = {"type": "3", "format/wide": "config:0-7,32-35", "format/other": "config1:4", "format/odd": "x"}
    unit = sysfs.unit(pmus.plant(tmp_path, {f"{pmus.DEVICES}/x/{name}": text for name, text in files.items()}), "x")
    assert unit is not None
    assert unit.encode({"wide": 0xABC, "other": 1}) == {"config": 0xA << 32 | 0xBC, "config1": 1 << 4}
    assert unit.encode({"config2": 9}) == {"config2": 9}
    for terms, text in (({"wide": 1 << 12}, "12 bits"), ({"none": 1}, "no term none"), ({"odd": 1}, "no term odd")):
        with pytest.raises(ConfigError, match=text):
            unit.encode(terms)


def test_lists_and_terms() -> None:
    assert sysfs.numbers("0-2,8") == [0, 1, 2, 8]
    assert sysfs.numbers("") == []
    assert sysfs.terms("event=0xcd,umask=0x1,inv") == {"event": 0xCD, "umask": 1, "inv": 1}
    for read, text in ((sysfs.numbers, "0-"), (sysfs.numbers, "a"), (sysfs.terms, "event=?")):
        with pytest.raises(ConfigError, match="such as"):
            read(text)


def test_a_description_that_nobody_understands_is_an_error(tmp_path: Path) -> None:
    tree = pmus.SKYLAKE | {f"{pmus.DEVICES}/cpu/format/umask": "somewhere:8-15\n"}
    with pytest.raises(ConfigError, match="umask"):
        events.hardware(pmus.plant(tmp_path, tree))


def test_a_watchpoint_names_its_bytes() -> None:
    event = events.watchpoint(0x1000, 4).event
    assert (event.type, event.config1, event.config2, event.breakpoint_type) == (5, 0x1000, 4, 3)
    assert replace(event, period=1) == event
