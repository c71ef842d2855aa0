"""The perf sampler over rings that a test makes: hot-plug, losses, useless addresses, hardware's own records."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit import pmus
from tests.unit.rings import KERNEL, PLAIN, USER, FakePmu, FakeRing, plain, record, sample
from tiermem import samples
from tiermem._native.perf import Event
from tiermem.errors import Closed, NativeError
from tiermem.sampler import sources
from tiermem.sampler.events import NamedEvent, hardware
from tiermem.sampler.perf import PerfSampler


@pytest.fixture
def pmu() -> Iterator[FakePmu]:
    pmu = FakePmu()
    yield pmu
    assert pmu.alive == []


@pytest.fixture
def skylake(tmp_path: Path) -> Path:
    return pmus.plant(tmp_path, pmus.SKYLAKE)


def host_sampler(root: Path, pmu: FakePmu, event: NamedEvent | tuple[NamedEvent, ...]) -> PerfSampler:
    return PerfSampler(event, opener=pmu, root=root)


def test_each_cpu_has_a_ring_with_its_own_period_that_sleeps_until_wanted(skylake: Path, pmu: FakePmu) -> None:
    with host_sampler(skylake, pmu, plain(period_step=1)) as sampler:
        assert [(ring.pid, ring.cpu) for ring in pmu.rings] == [(-1, cpu) for cpu in range(4)]
        assert [ring.event.period for ring in pmu.rings] == [1009, 1013, 1019, 1021]
        assert [ring.enabled for ring in pmu.rings] == [False] * 4
        sampler.watch(7)
        sampler.watch(8)
        assert all(ring.enabled for ring in pmu.rings)
        sampler.unwatch(7)
        assert all(ring.enabled for ring in pmu.rings)
        sampler.unwatch(8)
        assert not any(ring.enabled for ring in pmu.rings)


def test_hybrid_cores_get_their_own_part(tmp_path: Path, pmu: FakePmu) -> None:
    root = pmus.plant(tmp_path, pmus.ALDER_LAKE)
    with host_sampler(root, pmu, hardware(root)["mem-loads"]) as sampler:
        sampler.watch(1)
        places = {(ring.cpu, ring.event.type, ring.event.config) for ring in pmu.rings if ring.event.sample_type}
        assert places == {(cpu, 4, 0x1CD) for cpu in range(4)} | {(cpu, 10, 0x5D0) for cpu in (4, 5)}
        assert {ring.cpu for ring in pmu.rings if not ring.event.sample_type} == {0, 1, 2, 3}
        assert all(ring.enabled for ring in pmu.rings)  # the leaders too
        sampler.unwatch(1)
        assert not any(ring.enabled for ring in pmu.rings)


def test_a_cpu_is_left_out_while_it_is_offline(skylake: Path, pmu: FakePmu, monkeypatch: pytest.MonkeyPatch) -> None:
    pmu.refuse = lambda ring: errno.ENODEV if ring.cpu == 2 else 0
    with host_sampler(skylake, pmu, plain()) as sampler:
        assert [ring.cpu for ring in pmu.rings] == [0, 1, 3]
        sampler.watch(5)
        pmu.refuse = lambda ring: 0
        sampler.poll(0)
        assert [ring.cpu for ring in pmu.rings] == [0, 1, 3]
        monkeypatch.setattr(sampler, "_upkeep_s", 0.0)
        sampler.poll(0)
        assert [(ring.cpu, ring.enabled) for ring in pmu.rings[3:]] == [(2, True)]
        (skylake / "sys/devices/system/cpu/online").write_text("0-1,3\n")
        monkeypatch.setattr(sampler, "_upkeep_s", 0.0)
        sampler.poll(0)
        assert sorted(ring.cpu for ring in pmu.alive) == [0, 1, 3]


def test_no_cpu_at_all_is_an_error(skylake: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.ENODEV
    with pytest.raises(NativeError, match="no CPU that is online samples plain"):
        host_sampler(skylake, pmu, plain())


def test_what_a_refusal_leaves_open_is_closed(skylake: Path, pmu: FakePmu) -> None:
    pmu.refuse = lambda ring: errno.EACCES if ring.cpu == 3 else 0
    with pytest.raises(NativeError):
        host_sampler(skylake, pmu, plain())
    assert len(pmu.rings) == 3


def test_samples_of_several_rings_are_in_order_and_of_the_watched(skylake: Path, pmu: FakePmu) -> None:
    with host_sampler(skylake, pmu, plain()) as sampler:
        sampler.watch(7)
        sampler.watch(9)
        pmu.rings[0].content = sample(7, 0x1000, time_ns=30) + sample(8, 0x2000, time_ns=5)
        pmu.rings[3].content = sample(9, 0x3000, time_ns=20) + sample(7, 0x4000, time_ns=40)
        batch = sampler.poll(0)
    assert batch.samples["addr"].tolist() == [0x3000, 0x1000, 0x4000]
    assert batch.samples["pid"].tolist() == [9, 7, 7]
    assert batch.addressless == 0


def test_addresses_that_are_none_are_dropped_and_counted(skylake: Path, pmu: FakePmu) -> None:
    useful = [0x1, 0x7FFF_FFFF_FFFF, 0xFF_FFFF_FFFF_FFFF, 0xFFFF_8880_0000_0000]
    with host_sampler(skylake, pmu, plain()) as sampler:
        sampler.watch(7)
        wrong = [0, 1 << 63, 0x0123_4567_89AB_CDEF]
        pmu.rings[0].content = b"".join(sample(7, addr) for addr in useful + wrong) + sample(8, 0)
        batch = sampler.poll(0)
    assert batch.samples["addr"].tolist() == useful
    assert batch.addressless == len(wrong)


def test_kernel_samples_of_hardware_that_cannot_leave_them_out_are_dropped(skylake: Path, pmu: FakePmu) -> None:
    with host_sampler(skylake, pmu, (plain(), plain(user_only=True))) as sampler:
        sampler.watch(7)
        for ring in pmu.rings[:2]:
            ring.content = sample(7, 0x1000, misc=KERNEL) + sample(7, 0x2000) + sample(7, 0x3000, misc=USER | 1 << 14)
        batch = sampler.poll(0)
    assert sorted(batch.samples[["event", "addr"]].tolist()) == [
        (0, 0x1000), (0, 0x2000), (0, 0x3000), (1, 0x2000), (1, 0x3000)
    ]  # fmt: skip


def test_losses_are_of_this_poll_alone(skylake: Path, pmu: FakePmu) -> None:
    with host_sampler(skylake, pmu, plain()) as sampler:
        pmu.rings[0].lost, pmu.rings[1].lost = 5, 2
        pmu.rings[0].content = record(2, 1, 5) + record(13, 3) + record(5, 1, 1, 1) + record(6, 1, 1, 1)
        pmu.rings[2].content = record(13, 4) + record(11, 0, 64, 1) + record(11, 0, 64, 0) + record(5, 1, 1, 1)
        first = sampler.poll(0)
        pmu.rings[0].lost = 6
        second = sampler.poll(0)
    told = [(b.lost, b.lost_samples, b.throttled, b.unthrottled, b.aux_truncated) for b in (first, second)]
    assert told == [(7, 7, 2, 1, 1), (1, 0, 0, 0, 0)]


def test_a_poll_takes_out_a_ring_that_fills_as_fast(skylake: Path, pmu: FakePmu) -> None:
    class Endless(FakeRing):
        def read(self, buffer: bytearray) -> int:
            self.content = sample(7, 0x1000)
            return super().read(buffer)

    with host_sampler(skylake, pmu, plain()) as sampler:
        sampler.watch(7)
        pmu.rings[0].__class__ = Endless
        assert 1 <= len(sampler.poll(0).samples) < 10


def address_packet(index: int, address: int) -> bytes:
    return bytes([0xB0 | index]) + address.to_bytes(8, "little")


def spe_load(address: int, tid: int | None = None) -> bytes:
    """A record of Arm's SPE: context, operation (load), data address, timestamp."""
    context = b"" if tid is None else b"\x64" + struct.pack("<I", tid)
    return context + b"\x49\x00" + address_packet(2, address) + b"\x71" + struct.pack("<Q", 12345)


def test_arm_writes_its_own_records(tmp_path: Path, pmu: FakePmu) -> None:
    root = pmus.plant(tmp_path, pmus.KUNPENG)
    (spe,) = hardware(root)["spe-loads"]
    with host_sampler(root, pmu, spe) as sampler:
        assert {ring.aux_nbytes for ring in pmu.rings} == {spe.aux_bytes}
        sampler.watch(os.getpid())
        tid = os.getpid()
        whole = spe_load(0xABC000, tid) + spe_load(0xDEF000, 1) + spe_load(0xABD000, tid)
        pmu.rings[5].aux = whole[:-4]
        before = time.monotonic_ns()
        first = sampler.poll(0).samples
        pmu.rings[5].aux = whole[-4:]
        second = sampler.poll(0).samples
    assert first["addr"].tolist() == [0xABC000]
    assert second["addr"].tolist() == [0xABD000]  # the record was cut between two polls
    for rows in (first, second):
        assert set(rows["pid"].tolist()) == {os.getpid()}
        assert set(rows["cpu"].tolist()) == {5}
        assert set(rows["period"].tolist()) == {pmu.rings[5].event.period}
        assert before <= int(rows["time"][0]) <= time.monotonic_ns()


def test_arm_of_a_process_needs_no_context(tmp_path: Path, pmu: FakePmu) -> None:
    root = pmus.plant(tmp_path, pmus.KUNPENG)
    with PerfSampler(hardware(root)["spe-loads"], [os.getpid()], threads=False, opener=pmu, root=root) as sampler:
        pmu.rings[0].aux = spe_load(0xABC000)
        rows = sampler.poll(0).samples
    assert rows[["pid", "tid", "addr"]].tolist() == [(os.getpid(), pmu.rings[0].pid, 0xABC000)]


def test_fewer_rings_where_many_are_refused(skylake: Path, pmu: FakePmu, monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads of earlier tests may still be there.
    monkeypatch.setattr("tiermem.sampler.sources.threads", lambda pid: [pid])
    pmu.refuse = lambda ring: errno.EPERM if len(pmu.alive) > 2 or ring.event.inherit else 0
    with PerfSampler(plain(), [os.getpid()], opener=pmu, root=skylake) as sampler:
        assert {(ring.cpu, ring.event.inherit) for ring in pmu.alive} == {(-1, False)}
        assert sampler.watched == {os.getpid()}
    pmu.refuse = lambda ring: errno.EACCES if ring.event.inherit else 0
    with pytest.raises(NativeError):
        PerfSampler(plain(), [os.getpid()], opener=pmu, root=skylake)


def test_the_first_thread_comes_first_where_numbers_have_come_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda path: ["7", "32011", "12"] if path == "/proc/32011/task" else [])
    assert sources.threads(32011) == [32011, 7, 12]


def test_threads_that_get_no_ring_are_told_of(skylake: Path, pmu: FakePmu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.sampler.perf.MAX_RINGS", 0)
    known = sources.threads(os.getpid())
    monkeypatch.setattr("tiermem.sampler.sources.threads", lambda pid: known if pid == os.getpid() else [])
    with PerfSampler(plain(), [os.getpid()], opener=pmu, root=skylake) as sampler:
        assert sampler.poll(0).unfollowed == 0
        known = [*known, 4_000_001, 4_000_002]
        pmu.refuse = lambda ring: errno.EMFILE
        assert sampler.poll(0).unfollowed == 2
        pmu.refuse = lambda ring: 0
        assert sampler.poll(0).unfollowed == 0
        assert {4_000_001, 4_000_002} < {ring.pid for ring in pmu.alive}


def test_a_closed_sampler_says_so(skylake: Path, pmu: FakePmu) -> None:
    sampler = host_sampler(skylake, pmu, plain())
    sampler.close()
    sampler.close()
    for use in (lambda: sampler.poll(0), lambda: sampler.watch(1)):
        with pytest.raises(Closed, match="make another"):
            use()


def test_the_kernels_clock_is_shifted(skylake: Path, pmu: FakePmu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.sampler.clock.offset_ns", lambda: -1000)
    unshifted = plain()
    ours = hardware(skylake)["all-loads"][0]
    event = NamedEvent("own clock", "test", Event(ours.event.type, 0, sample_type=PLAIN))
    with host_sampler(skylake, pmu, (event, unshifted)) as sampler:
        sampler.watch(7)
        pmu.rings[0].content = sample(7, 0x1000, time_ns=5000)
        pmu.rings[1].content = sample(7, 0x2000, time_ns=5000)
        rows = sampler.poll(0).samples
    assert rows[["addr", "time"]].tolist() == [(0x1000, 4000), (0x2000, 5000)]
    assert rows.dtype == samples.SAMPLE
    assert np.all(rows["period"] == 1)
