"""The ladder over rings that a test makes: each refusal has its words, and the best rung that is left is chosen."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit import pmus
from tests.unit.rings import FakePmu
from tiermem import samples
from tiermem.errors import ConfigError, NativeError
from tiermem.observations import Rung
from tiermem.sampler import choose, ladder
from tiermem.sampler.perf import PerfSampler


@pytest.fixture
def pmu() -> Iterator[FakePmu]:
    pmu = FakePmu()
    yield pmu
    assert pmu.alive == []


@pytest.fixture
def skylake(tmp_path: Path) -> Path:
    rights = {"proc/sys/kernel/perf_event_paranoid": "4\n", "proc/self/status": "CapEff:\t0000000000000000\n"}
    return pmus.plant(tmp_path, pmus.SKYLAKE | rights)


ROOT_STATUS = {"proc/self/status": "CapEff:\t000001ffffffffff\n"}


@pytest.mark.parametrize(
    ("number", "whole_host", "own"),
    [
        (errno.EBUSY, "another user holds the PMU", "another user holds the PMU"),
        (errno.ENOSPC, "says ENOSPC; end perf", "another user holds the PMU"),
        (errno.ENOENT, "no PMU: perf_event_open of all-loads says ENOENT", "no PMU"),
        (errno.EOPNOTSUPP, "no PMU: perf_event_open of all-loads says EOPNOTSUPP", "no PMU"),
        (errno.EACCES, "no CAP_PERFMON; grant it, or set sysctl kernel.perf_event_paranoid=0 (is 4)",
         "kernel.perf_event_paranoid=2 (is 4)"),
        (errno.ENODATA, "perf_event_open of all-loads says ENODATA", "ENODATA"),
    ],
)  # fmt: skip
def test_each_refusal_has_its_words(skylake: Path, pmu: FakePmu, number: int, whole_host: str, own: str) -> None:
    pmu.refuse = lambda ring: number
    wide, narrow = ladder(skylake, pmu)[:2]
    assert (wide.rung, wide.whole_host, wide.available, wide.events) == (Rung.PERF, True, False, ())
    assert (narrow.rung, narrow.whole_host, narrow.available) == (Rung.PERF, False, False)
    assert whole_host in wide.reason
    assert own in narrow.reason
    with pytest.raises(ConfigError, match="cannot be sampled by perf here") as caught:
        choose("perf", skylake, pmu)
    assert own in str(caught.value)
    assert choose("auto", skylake, pmu).rung < Rung.PERF


def test_rights_that_do_not_help_are_not_asked_for(skylake: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.EACCES
    assert "in spite of our rights" in ladder(pmus.plant(skylake, ROOT_STATUS), pmu)[0].reason


def test_rungs_are_in_order_and_named(skylake: Path, pmu: FakePmu) -> None:
    states = ladder(skylake, pmu)
    names = ["perf (whole host)", "perf (own processes)", "present", "accessed", "declared"]
    assert [state.name for state in states] == names
    assert states[0].available
    assert states[0].reason == "Intel PEBS samples all-loads"
    assert all(ring.event.disabled for ring in pmu.rings)
    assert {(ring.pid, ring.cpu) for ring in pmu.rings} == {(-1, 0), (0, -1)}
    assert choose("auto", skylake, pmu) == states[0]
    assert choose("declared", skylake, pmu) == states[-1]
    assert choose("off", skylake, pmu).rung is Rung.NONE
    with pytest.raises(ConfigError, match="use auto, perf, present, accessed, declared or off"):
        choose("pebs", skylake, pmu)


def test_own_processes_are_left_where_the_host_is_forbidden(skylake: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.EACCES if ring.pid < 0 else 0
    state = choose("perf", skylake, pmu)
    assert (state.available, state.whole_host) == (True, False)


def test_physical_addresses_only_where_they_may_be_known(skylake: Path, pmu: FakePmu) -> None:
    assert ladder(skylake, pmu)[0].events[0].event.sample_type & samples.PHYS_ADDR
    pmu.refuse = lambda ring: errno.EACCES if ring.event.sample_type & samples.PHYS_ADDR else 0
    state = ladder(skylake, pmu)[0]
    assert state.available
    assert not state.events[0].event.sample_type & samples.PHYS_ADDR


def test_the_next_event_serves_where_the_first_is_unknown(tmp_path: Path, pmu: FakePmu) -> None:
    root = pmus.plant(tmp_path, pmus.SAPPHIRE_RAPIDS)
    pmu.refuse = lambda ring: errno.ENOENT if ring.event.config == 0x81D0 else 0
    state = ladder(root, pmu)[0]
    assert [part.name for part in state.events] == ["mem-loads"]
    aux, loads = [ring for ring in pmu.rings if ring.pid < 0]
    assert (aux.event.config, aux.leader, loads.leader) == (0x8203, None, aux)


def test_ibs_of_old_kernels_is_for_the_whole_host(tmp_path: Path, pmu: FakePmu) -> None:
    root = pmus.plant(tmp_path, pmus.ZEN3)
    wide, narrow = ladder(root, pmu)[:2]
    assert (wide.available, narrow.available) == (True, False)
    assert "Linux 6.2" in narrow.reason
    with pytest.raises(ConfigError, match="ibs-op cannot follow processes"):
        PerfSampler(wide.events, [os.getpid()], opener=pmu, root=root)


def test_a_host_without_a_pmu(tmp_path: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.ENOENT
    assert ladder(tmp_path, pmu)[0].reason.startswith("no PMU")


def test_a_description_that_nobody_understands_is_a_reason(skylake: Path, pmu: FakePmu) -> None:
    (skylake / pmus.DEVICES / "cpu/format/umask").write_text("nowhere\n")
    assert "umask" in ladder(skylake, pmu)[0].reason


def test_present_tells_by_which_means(skylake: Path, pmu: FakePmu, monkeypatch: pytest.MonkeyPatch) -> None:
    for scans, text in ((True, "come back: PAGEMAP_SCAN"), (False, "PAGEMAP_SCAN needs Linux 6.7")):
        opened = SimpleNamespace(scans=scans, close=lambda: None)
        monkeypatch.setattr("tiermem.sampler.rungs.Pagemap", lambda opened=opened: opened)
        assert text in ladder(skylake, pmu)[2].reason

    def refuse() -> None:
        raise NativeError("cannot open /proc/self/pagemap: Permission denied", errno.EACCES)

    monkeypatch.setattr("tiermem.sampler.rungs.Pagemap", refuse)
    state = ladder(skylake, pmu)[2]
    assert (state.available, state.reason) == (False, "cannot open /proc/self/pagemap: Permission denied")
    with pytest.raises(ConfigError, match="Permission denied"):
        choose("present", skylake, pmu)


def test_accessed_needs_clear_refs(tmp_path: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.ENOENT
    assert not ladder(tmp_path, pmu)[3].available
    state = ladder(pmus.plant(tmp_path, {"proc/self/clear_refs": ""}), pmu)[3]
    assert state.available
    assert "hugetlb" in state.reason
