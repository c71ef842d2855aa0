"""PerfSampler on the running kernel: page faults and debug registers say exactly which addresses were touched."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.integration.child import NOBODY, Child
from tests.integration.touched import UNIT_BYTES, Touched, Words
from tiermem.errors import ConfigError, NativeError
from tiermem.sampler import choose, events
from tiermem.sampler.events import NamedEvent, faults, watchpoint
from tiermem.sampler.perf import Batch, PerfSampler
from tiermem.sampler.records import Comm, Exit, Fork, Mmap

UNITS = 256
MINOR = faults()[0]

TOUCHER = """
import threading
from tests.integration.touched import Touched
def touch_all(memory, seed):
    memory.touch_all(seed)
    say("done")
"""


def script(body: str, *arguments: object, uid: int | None = None) -> Child:
    return Child.script(TOUCHER + body, *arguments, uid=uid)


@pytest.fixture
def memory() -> Iterator[Touched]:
    with Touched(UNITS) as memory:
        yield memory


def collect(sampler: PerfSampler, polls: int = 2) -> list[Batch]:
    return [sampler.poll(0) for _ in range(polls)]


def rows(batches: list[Batch]) -> npt.NDArray[np.void]:
    return np.concatenate([batch.samples for batch in batches])


def within(batches: list[Batch], begin: int, units: int = UNITS) -> npt.NDArray[np.void]:
    found = rows(batches)
    return found[(found["addr"] >= begin) & (found["addr"] < begin + units * UNIT_BYTES)]


def test_own_process_every_address_in_order(memory: Touched) -> None:
    with PerfSampler(faults(), [os.getpid()], threads=False) as sampler:
        before = time.monotonic_ns()
        memory.touch_all(1)
        after = time.monotonic_ns()
        found = within([sampler.poll(0)], memory.address)
    assert found["addr"].tolist() == memory.order(1)
    assert set(found["tid"].tolist()) == {threading.get_native_id()}
    assert set(found["pid"].tolist()) == {os.getpid()}
    assert before <= int(found["time"][0])
    assert int(found["time"][-1]) <= after


def test_times_of_events_on_the_kernels_clock_are_converted(memory: Touched) -> None:
    event = replace(MINOR, event=replace(MINOR.event, monotonic=False))
    with PerfSampler(event, [os.getpid()], threads=False) as sampler:
        brackets = []
        for address in memory.order(2):
            before = time.monotonic_ns()
            memory.touch(address)
            brackets.append((before, time.monotonic_ns()))
        found = within([sampler.poll(0)], memory.address)
    slack_ns = 200_000
    assert len(found) == UNITS
    for row, (before, after) in zip(found, brackets, strict=True):
        assert before - slack_ns <= int(row["time"]) <= after + slack_ns


def test_another_process_and_its_two_threads() -> None:
    body = """
memories = Touched(256), Touched(256)
gates = threading.Event(), threading.Event()
def run(n):
    gates[n].wait()
    memories[n].touch_all(n)
threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
for thread in threads: thread.start()
say(" ".join(str(number) for n in (0, 1) for number in (memories[n].address, threads[n].native_id)))
pause()
for gate in gates: gate.set()
for thread in threads: thread.join()
say("done")
pause()
"""
    with script(body) as child:
        address0, tid0, address1, tid1 = map(int, child.line().split())
        with PerfSampler(MINOR, [child.pid]) as sampler:
            child.say()
            assert child.line() == "done"
            batches = collect(sampler)
    for seed, (address, tid) in enumerate(((address0, tid0), (address1, tid1))):
        found = within(batches, address)
        assert found["addr"].tolist() == Touched.offsets(UNITS, seed, address)
        assert set(found["tid"].tolist()) == {tid}
        assert set(found["pid"].tolist()) == {child.pid}
    assert np.all(np.diff(batches[0].samples["time"].astype(np.int64)) >= 0)


@pytest.mark.parametrize("how", ["a grandchild", "a thread"])
def test_what_starts_later_is_inherited(how: str) -> None:
    body = """
memory = Touched(256)
say(memory.address)
pause()
if sys.argv[1] == "a thread":
    thread = threading.Thread(target=touch_all, args=(memory, 5)); thread.start(); thread.join()
elif (child := os.fork()) == 0:
    if (grandchild := os.fork()) == 0:
        touch_all(memory, 5)
        os._exit(0)
    os.waitpid(grandchild, 0)
    os._exit(0)
else:
    os.waitpid(child, 0)
pause()
"""
    with script(body, how) as child:
        address = int(child.line())
        with PerfSampler(MINOR, [child.pid], sideband=True) as sampler:
            child.say()
            assert child.line() == "done"
            found = within(batches := collect(sampler), address)
    assert found["addr"].tolist() == Touched.offsets(UNITS, 5, address)
    assert child.pid not in found["tid"].tolist()
    forks = [record for batch in batches for record in batch.sideband if isinstance(record, Fork)]
    assert int(found["tid"][0]) in {fork.tid for fork in forks}


def test_threads_are_sought_where_inheriting_costs_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiermem.sampler.perf.MAX_RINGS", 1)
    body = """
memory = Touched(256)
say(memory.address)
pause()
gate = threading.Event()
thread = threading.Thread(target=lambda: (gate.wait(), touch_all(memory, 3))); thread.start()
say("started")
pause()
gate.set()
thread.join()
pause()
"""
    with script(body) as child:
        address = int(child.line())
        with PerfSampler(MINOR, [child.pid]) as sampler:
            child.say()
            assert child.line() == "started"
            sampler.poll(0)
            child.say()
            assert child.line() == "done"
            found = within(collect(sampler), address)
    assert found["addr"].tolist() == Touched.offsets(UNITS, 3, address)


ROUNDS = """
memory = Touched(256)
say(memory.address)
while pause() != "end":
    touch_all(memory, 7)
    memory.forget()
"""


@pytest.mark.root
def test_the_whole_host_keeps_what_is_watched() -> None:
    with script(ROUNDS) as one, script(ROUNDS) as other, PerfSampler(MINOR) as sampler:
        addresses = {child.pid: int(child.line()) for child in (one, other)}

        def touched() -> set[int]:
            for child in (one, other):
                child.say()
                assert child.line() == "done"
            batch = sampler.poll(0)
            pids = set(batch.samples["pid"].tolist())
            for pid in pids:
                mine = batch.samples[batch.samples["pid"] == pid]
                found = within([replace(batch, samples=mine)], addresses[pid])
                assert found["addr"].tolist() == Touched.offsets(UNITS, 7, addresses[pid])
            return pids

        assert touched() == set()
        sampler.watch(one.pid)
        sampler.watch(one.pid)
        assert touched() == {one.pid}
        sampler.watch(other.pid)
        assert touched() == {one.pid, other.pid}
        sampler.unwatch(one.pid)
        assert touched() == {other.pid}
        sampler.unwatch(other.pid)
        assert touched() == set()
        assert sampler.watched == frozenset()


@pytest.mark.root
def test_nothing_is_sampled_while_nobody_is_watched() -> None:
    with script(ROUNDS) as child, PerfSampler(MINOR) as sampler:
        int(child.line())
        child.say()
        child.line()
        sampler.watch(child.pid)  # what came before is not in the rings
        assert not len(sampler.poll(0).samples)


WORDS = """
from tests.integration.touched import Words
words = Words(64)
say(words.address)
pause()
words.read(5, int(sys.argv[1]))
words.read(6, 100)
say("done")
pause()
"""


def test_debug_registers_count_another_process() -> None:
    with script(WORDS, 1000) as child:
        address = int(child.line()) + 5 * 8
        with PerfSampler(watchpoint(address), [child.pid]) as sampler:
            child.say()
            assert child.line() == "done"
            found = rows(collect(sampler))
    assert len(found) == 1000
    assert set(found["addr"].tolist()) == {address}
    assert set(found["tid"].tolist()) == {child.pid}


def test_debug_registers_count_this_process() -> None:
    words = Words(64)
    with PerfSampler(watchpoint(words.address + 40), [os.getpid()], threads=False) as sampler:
        words.read(5, 1000)
        words.read(4, 10)
        found = rows(collect(sampler))
    assert set(found["addr"].tolist()) == {words.address + 40}
    assert found["tid"].tolist() == [threading.get_native_id()] * 1000


def test_a_full_ring_loses_and_counts() -> None:
    with script(WORDS, 3000) as child:
        address = int(child.line()) + 5 * 8
        with PerfSampler(watchpoint(address), [child.pid], ring_bytes=4096, threads=False) as sampler:
            child.say()
            assert child.line() == "done"
            batches = collect(sampler)
    assert 50 < len(rows(batches)) < 100  # 4 KiB of records
    assert batches[0].lost > 0
    assert len(rows(batches)) + sum(batch.lost for batch in batches) == 3000


def test_a_ring_is_worth_waking_for_at_a_quarter(memory: Touched) -> None:
    with PerfSampler(MINOR, [os.getpid()], ring_bytes=16 << 10, threads=False) as sampler:
        memory.touch_all(1)
        begin = time.monotonic()
        batch = sampler.poll(10)
        assert time.monotonic() - begin < 5
    assert len(batch.samples) >= UNITS // 2
    assert 0 < batch.cost_s < 1


def test_a_process_that_ends_is_sampled_to_its_end() -> None:
    body = """
memory = Touched(256)
say(memory.address)
pause()
touch_all(memory, 9)
"""
    with script(body) as child:
        address = int(child.line())
        with PerfSampler(faults(), [child.pid], sideband=True) as sampler:
            assert sampler.watched == {child.pid}
            child.say()
            child.exit_code()
            batches = collect(sampler, 3)
            assert sampler.watched == frozenset()
            begin = time.monotonic()
            assert not len(sampler.poll(0.05).samples)
            assert time.monotonic() - begin > 0.04  # a ring of the dead would wake it for ever
    assert within(batches, address)["addr"].tolist() == Touched.offsets(UNITS, 9, address)
    exits = [record for batch in batches for record in batch.sideband if isinstance(record, Exit)]
    assert [record.pid for record in exits if record.tid == child.pid] == [child.pid]


def test_exec_keeps_the_process_and_tells_of_it() -> None:
    body = """
say("ready")
pause()
os.execv(sys.executable, [sys.executable, "-S", "-c", "print('new', flush=True); input()"])
"""
    with script(body) as child:
        assert child.line() == "ready"
        with PerfSampler(MINOR, [child.pid], sideband=True) as sampler:
            child.say()
            assert child.line() == "new"
            batches = collect(sampler)
    told = [record for batch in batches for record in batch.sideband]
    (comm,) = [record for record in told if isinstance(record, Comm) and record.exec]
    assert comm.pid == child.pid
    assert comm.name.startswith("python")
    maps = [record for record in told if isinstance(record, Mmap) and record.time >= comm.time]
    assert any("python" in record.path and record.inode for record in maps)
    assert all(record.pid == child.pid and record.length for record in maps)
    assert np.count_nonzero(rows(batches)["time"] > comm.time) > 50


def test_a_process_that_does_not_exist() -> None:
    gone = Child(["-c", "pass"])
    with gone:
        gone.exit_code()
    with pytest.raises(NativeError, match=f"process {gone.pid} does not exist or has ended") as caught:
        PerfSampler(MINOR, [gone.pid])
    assert caught.value.errno == errno.ESRCH


def test_closing_gives_back_every_ring(memory: Touched) -> None:
    def rings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("[perf_event]")

    before = rings()
    with PerfSampler(faults(), [os.getpid()]) as sampler:
        assert rings() > before
        sampler.unwatch(os.getpid())
        assert rings() == before
        sampler.watch(os.getpid())
    sampler.close()
    assert rings() == before


def test_a_refused_ring_closes_those_before_it() -> None:
    before = Path("/proc/self/maps").read_text().count("[perf_event]")
    bad = NamedEvent("bad", "none", events.Event(4294967, 0, sample_type=8))
    with pytest.raises(NativeError):
        PerfSampler([MINOR, bad], [os.getpid()])
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("[perf_event]") == before
    with pytest.raises(ConfigError, match="at least one"):
        PerfSampler([], [os.getpid()])


@pytest.mark.root
def test_an_ordinary_user_samples_own_processes_and_nothing_else() -> None:
    sampling = """
from tiermem.sampler import choose
from tiermem.sampler.events import faults
from tiermem.sampler.perf import PerfSampler
address, pid = int(sys.argv[1]), int(sys.argv[2])
with PerfSampler(faults()[0], [pid]) as sampler:
    say("sampling")
    pause()
    found = sampler.poll(0).samples
    say(" ".join(str(a) for a in found["addr"].tolist() if address <= a < address + 256 * 65536))
for attempt in (lambda: PerfSampler(faults()[0]), lambda: PerfSampler(faults()[0], [1])):
    try:
        attempt()
    except Exception as problem:
        say(type(problem).__name__ + " " + str(problem))
"""
    with script(ROUNDS, uid=NOBODY) as subject:
        address = int(subject.line())
        with script(sampling, address, subject.pid, uid=NOBODY) as sampler:
            assert sampler.line() == "sampling"
            subject.say()
            assert subject.line() == "done"
            sampler.say()
            assert [int(text) for text in sampler.line().split()] == Touched.offsets(UNITS, 7, address)
            whole_host, stranger = sampler.line(), sampler.line()
    assert whole_host.startswith("NativeError")
    assert "CAP_PERFMON" in whole_host
    assert "perf_event_paranoid" in whole_host
    assert stranger.startswith("NativeError")


def test_the_ladder_ends_at_what_works_here() -> None:
    best = choose("auto")
    assert best.available
    assert choose("off").rung.name == "NONE"
    if best.rung.name != "PERF":
        with pytest.raises(ConfigError, match="no PMU"):
            choose("perf")
