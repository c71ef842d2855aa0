"""Loads and their loader: every byte once, wanted ones first, and whoever waits is told."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.checkpoint.layout import RawTensor, lay_out
from tiermem.errors import CapacityError, CheckpointChanged, Closed, DigestMismatch, NativeError, ReadError
from tiermem.load import Load, Task, plan_checks, plan_reads, readiness
from tiermem.loader import Loader
from tiermem.types import PAGE_BYTES, CheckpointFile, Manifest

KIB = 1024


def manifest_of(sizes: Sequence[Sequence[tuple[int, str]]], header: int = 100) -> Manifest:
    """A manifest of files, each a list of (bytes, layer) of its tensors, packed behind a header."""
    raw, layers = [], {}
    for file, tensors in enumerate(sizes):
        at = header
        for i, (nbytes, layer) in enumerate(tensors):
            raw.append(RawTensor(f"{file}.{i}", "U8", (nbytes,), file, at, nbytes))
            layers[f"{file}.{i}"] = layer
            at += nbytes
    segments, infos = lay_out(raw, layers)
    files = tuple(CheckpointFile(f"/weights/{i}", 1, i, 1 << 40, 0, "digest") for i in range(len(sizes)))
    return Manifest("/weights", "id", files, segments, infos)


def record_of(manifest: Manifest) -> ModelRecord:
    return ModelRecord("model", manifest, [None] * len(manifest.tensors))


# --- planning -----------------------------------------------------------------------------------------------------

SIZES = st.lists(
    st.lists(st.tuples(st.sampled_from([0, 1, 5, 4096, 8191, 20_000]) | st.integers(0, 30_000),
                       st.sampled_from("abcd")), max_size=8),
    min_size=1, max_size=3,
)  # fmt: skip


@given(SIZES, st.integers(0, 5000), st.sampled_from([4096, 8192, 12_288, 1 << 20]), st.data())
def test_reads_cover_every_wanted_byte_once_and_cross_no_block(
    sizes: list[list[tuple[int, str]]], header: int, block: int, data: st.DataObject
) -> None:
    manifest = manifest_of(sizes, header)
    wanted = data.draw(st.sets(st.sampled_from(range(len(manifest.segments))))) if manifest.segments else set()
    tasks = plan_reads(manifest, wanted, block)
    covered = {i: np.zeros(t.nbytes, np.int8) for i, t in enumerate(manifest.tensors) if t.extent.segment in wanted}
    for task in tasks:
        assert set(task.tensors) == {part.tensor for part in task.parts} or not task.parts
        end = 0
        for part in task.parts:
            tensor = manifest.tensors[part.tensor]
            assert tensor.file == task.file
            assert part.length > 0
            start = tensor.file_offset + part.offset
            assert start >= end, "parts ascend and are disjoint"
            end = start + part.length
            covered[part.tensor][part.offset : part.offset + part.length] += 1
        if task.parts:
            first = manifest.tensors[task.parts[0].tensor].file_offset + task.parts[0].offset
            assert first // block == (end - 1) // block
    assert all((count == 1).all() for count in covered.values())
    assert {i for task in tasks for i in task.tensors} == set(covered), "empty tensors are published as well"
    reads = [(task.file, task.parts[0]) for task in tasks if task.parts]
    places = [(file, manifest.tensors[part.tensor].file_offset + part.offset) for file, part in reads]
    assert places == sorted(places), "in file order"


def test_checks_are_of_every_tensor_of_the_segments() -> None:
    record = record_of(manifest_of([[(10, "a"), (0, "b"), (10, "a"), (10, "c")]]))
    tasks = plan_checks(record, [0, 1])
    assert [task.tensors for task in tasks] == [(0,), (2,), (1,)]
    assert not any(task.parts for task in tasks)


# --- a load by hand -----------------------------------------------------------------------------------------------


class Content:
    """A source whose byte i of file f is known; raises or waits where told."""

    def __init__(self) -> None:
        self.number = 0
        self.reads: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.changed: Exception | None = None
        self.gate: threading.Semaphore | None = None
        self.entered = threading.Semaphore(0)
        self.closed = False

    @staticmethod
    def bytes_of(file: int, offset: int, length: int) -> bytes:
        return bytes((file * 89 + at * 7 + at // 251) % 256 for at in range(offset, offset + length))

    def read(self, file: int, parts: Sequence[tuple[int, int, int]], staging: Any) -> None:
        self.reads.append((self.number or file, parts[0][0]))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.acquire(timeout=10)
        if self.error is not None:
            raise self.error
        for offset, length, destination in parts:
            ctypes.memmove(destination, self.bytes_of(file, offset, length), length)

    def check(self) -> None:
        if self.changed is not None:
            raise self.changed

    def close(self) -> None:
        self.closed = True


class Bench:
    """A load over anonymous segments, its source, and which segments it completed."""

    def __init__(self, manifest: Manifest, block: int = 4096, stock: Any = None, is_check: bool = False) -> None:
        self.record = record_of(manifest)
        self.source = Content()
        self.completed: list[int] = []
        self.lock = threading.RLock()
        self.segments = {
            i: _native.Segment.create(-1, f"{i}", segment.page_bytes) for i, segment in enumerate(manifest.segments)
        }
        tasks = plan_reads(manifest, self.segments, block)
        if is_check:
            tasks = plan_checks(self.record, self.segments)
        self.load = Load(
            self.record, self.segments, tasks, None if is_check else self.source, stock, self.lock,  # type: ignore[arg-type]
            lambda load, segment: self.completed.append(segment),
        )  # fmt: skip

    def tasks(self) -> list[Task]:
        return list(iter(self.load.next_task, None))

    def bytes_of(self, tensor: int) -> bytes:
        extent = self.record.manifest.tensors[tensor].extent
        return bytes(self.segments[extent.segment].buffer()[extent.offset : extent.offset + extent.length])

    def wanted(self, tensor: int) -> bytes:
        info = self.record.manifest.tensors[tensor]
        return Content.bytes_of(info.file, info.file_offset, info.nbytes)


@pytest.fixture
def staging() -> Iterator[_native.Staging]:
    made = _native.Staging(64 * KIB)
    yield made
    made.close()


LAYERS = manifest_of([[(4096, "a"), (4096, "a"), (9000, "b"), (0, "c")], [(5000, "b"), (1, "c")]], header=4096)


@pytest.mark.parametrize("seed", range(5))
def test_tensors_are_published_when_their_last_read_ends_in_whatever_order(staging: Any, seed: int) -> None:
    bench = Bench(LAYERS)
    tensors = range(len(LAYERS.tensors))
    futures = {i: bench.load.when_ready([i]) for i in tensors}
    tasks = bench.tasks()
    np.random.default_rng(seed).shuffle(tasks)
    left = {i: sum(i in task.tensors for task in tasks) for i in tensors}
    for task in tasks:
        bench.load.perform(task, staging)
        for i in task.tensors:
            left[i] -= 1
        assert [futures[i].done() for i in tensors] == [left[i] == 0 for i in tensors]
        assert bench.record.ready.tolist() == [left[i] == 0 for i in tensors]
        whole = {s for s in range(3) if all(left[i] == 0 for i in bench.record.tensors_of[s])}
        assert set(bench.completed) == whole
    assert sorted(bench.completed) == [0, 1, 2]
    for i in tensors:
        assert bench.bytes_of(i) == bench.wanted(i)
        assert bench.record.digests[i] == blake3(bench.wanted(i)).digest()
    assert bench.load.figures.read_bytes == LAYERS.nbytes
    assert not bench.load.finished.done(), "the pool says when it has ended"
    bench.load.end(None)
    assert bench.load.finished.result(0) is None
    assert bench.source.closed


def test_wanted_tensors_jump_the_queue() -> None:
    bench = Bench(manifest_of([[(4096, f"layers.{i}") for i in range(8)]], header=4096))
    first = bench.load.next_task()
    assert first is not None
    bench.load.when_ready([6, 4])
    bench.load.when_ready([6, 0])
    assert bench.load.urgent
    order = [first.tensors, *(task.tensors for task in bench.tasks())]
    assert order == [(0,), (4,), (6,), (1,), (2,), (3,), (5,), (7,)] or order[1:3] == [(6,), (4,)]
    assert len(order) == 8, "none is done twice"
    assert order[3:] == [(1,), (2,), (3,), (5,), (7,)]
    assert not bench.load.urgent


def test_all_who_wait_are_told_of_a_failure_and_nothing_more_is_begun(staging: Any) -> None:
    bench = Bench(LAYERS)
    futures = [bench.load.when_ready([0]), bench.load.when_ready([1, 2, 3]), bench.load.when_ready(None)]
    task = bench.load.next_task()
    assert task is not None
    bench.load.fail(ReadError("the disk"))
    bench.load.fail(ReadError("a later one"))
    assert bench.load.next_task() is None
    assert not bench.load.done, "a task is under way"
    bench.load.in_flight -= 1
    assert bench.load.done
    assert not any(future.done() for future in futures)
    bench.load.end(bench.load.error)
    for future in futures:
        with pytest.raises(ReadError, match="the disk"):
            future.result(0)


def test_a_waiter_that_gave_up_takes_nobody_along(staging: Any) -> None:
    bench = Bench(LAYERS)
    gone, there = bench.load.when_ready([0]), bench.load.when_ready([0])
    assert gone.cancel()
    for task in bench.tasks():
        bench.load.perform(task, staging)
    assert there.result(0) is None


def test_a_tensor_that_is_there_is_not_waited_for(staging: Any) -> None:
    bench = Bench(LAYERS)
    for task in bench.tasks():
        bench.load.perform(task, staging)
    assert bench.load.when_ready([0, 3]).done()
    assert bench.load.when_ready([]).done()
    assert readiness(None, None).done()
    assert not readiness(bench.load, None).done()


def test_bytes_that_differ_from_their_record_are_not_published(staging: Any) -> None:
    bench = Bench(LAYERS)
    bench.record.digests[1] = bytes(32)
    for task in bench.tasks():
        if 1 in task.tensors:
            with pytest.raises(DigestMismatch, match=r"model: tensor '0\.1' has digest [0-9a-f]{16}, 0{16} is on"):
                bench.load.perform(task, staging)
        else:
            bench.load.perform(task, staging)
    assert bench.record.ready.tolist() == [True, False, True, True, True, True]
    assert sorted(bench.completed) == [1, 2]


def test_bytes_of_a_file_that_changed_meanwhile_are_not_published(staging: Any) -> None:
    bench = Bench(LAYERS)
    task = bench.load.next_task()
    assert task is not None
    bench.source.changed = CheckpointChanged("it did")
    with pytest.raises(CheckpointChanged):
        bench.load.perform(task, staging)
    assert not bench.record.ready.any()


def test_a_file_that_changed_after_its_last_tensor_is_found_at_the_end(staging: Any) -> None:
    bench = Bench(LAYERS)
    for task in bench.tasks():
        bench.load.perform(task, staging)
    assert bench.load.outcome() is None
    bench.source.changed = CheckpointChanged("it did")
    assert bench.load.outcome() is bench.source.changed
    bench.load.fail(ReadError("the disk"))
    assert str(bench.load.outcome()) == "the disk"


def test_a_check_digests_what_is_in_memory(staging: Any) -> None:
    bench = Bench(LAYERS, is_check=True)
    for segment in bench.segments.values():
        segment.prefault()
        np.frombuffer(segment.buffer(), np.uint8)[:] = 3
    bench.record.digests = [blake3(b"\3" * tensor.nbytes).digest() for tensor in LAYERS.tensors]
    assert bench.load.is_check
    for task in bench.tasks():
        bench.load.perform(task, staging)
    assert bench.record.ready.all()
    assert bench.source.reads == []
    assert bench.load.figures.check_only


class Stock:
    """Gives what it has; counts what it was asked for."""

    def __init__(self, nbytes: int, late: int = 0) -> None:
        self.nbytes, self.late, self.asked = nbytes, late, 0

    def take(self, nbytes: int) -> int:
        self.asked += nbytes
        taken = min(nbytes, self.nbytes)
        self.nbytes += self.late - taken
        self.late = 0
        return taken


def test_memory_comes_from_the_stock_first(staging: Any) -> None:
    stock = Stock(64 * PAGE_BYTES)
    bench = Bench(manifest_of([[(3 * PAGE_BYTES, "a")]], header=0), block=PAGE_BYTES, stock=stock)
    for task in bench.tasks():
        bench.load._prefault(task)
    assert stock.nbytes == 61 * PAGE_BYTES, "as many pages as were prefaulted"


def test_memory_that_the_stock_took_meanwhile_is_taken_back(staging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Stock(0, late=PAGE_BYTES)
    bench = Bench(manifest_of([[(100, "a")]]), stock=stock)
    prefault = _native.Segment.prefault

    def full_while_stocked(segment: _native.Segment, *args: int) -> None:
        if stock.nbytes:
            raise NativeError("no space", 28)
        prefault(segment, *args)

    monkeypatch.setattr(_native.Segment, "prefault", full_while_stocked)
    for task in bench.tasks():
        bench.load.perform(task, staging)
    assert bench.record.ready.all()


def test_memory_that_cannot_be_had_is_a_lack_of_capacity(staging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(segment: _native.Segment, *args: int) -> None:
        raise NativeError("no space", 28)

    monkeypatch.setattr(_native.Segment, "prefault", full)
    for stock in (None, Stock(0), Stock(3 * PAGE_BYTES)):
        bench = Bench(manifest_of([[(100, "a")]]), stock=stock)
        with pytest.raises(CapacityError, match=r"model: 2097152 bytes of memory for a could not be had.*--dram"):
            bench.load.perform(bench.tasks()[0], staging)


# --- the loader ---------------------------------------------------------------------------------------------------


class Ends:
    """What the pool does when a load has ended."""

    def __init__(self) -> None:
        self.loads: list[Load] = []

    def __call__(self, load: Load) -> None:
        self.loads.append(load)
        load.end(load.error)


@pytest.fixture
def make_loader() -> Iterator[Callable[..., tuple[Loader, Ends]]]:
    made: list[Loader] = []

    def make(threads: int = 1, staging_bytes: int = 1 << 20, lock: Any = None) -> tuple[Loader, Ends]:
        ends = Ends()
        made.append(Loader(threads, staging_bytes, lock or threading.RLock(), ends))
        return made[-1], ends

    yield make
    for each in made:
        each.close()


def sharing(bench: Bench, others: Sequence[Bench]) -> None:
    for other in others:
        other.lock = other.load._lock = bench.lock


def rss_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


@pytest.mark.parametrize(
    ("threads", "staging_bytes"),
    [(1, 1 << 20), (3, (1 << 20) + 4096), (4, 64 << 20), (7, 20 << 20), (64, 1 << 20), (64, 64 << 20), (1, 1 << 30)],
)
def test_staging_stays_within_its_budget(
    make_loader: Callable[..., tuple[Loader, Ends]], threads: int, staging_bytes: int
) -> None:
    before = rss_bytes()
    made, _ = make_loader(threads, staging_bytes)
    made.start()
    assert 0 < made.staging_bytes <= staging_bytes
    assert rss_bytes() - before <= staging_bytes + threads * 64 * KIB, "as memory, not as a number only"


def test_wanted_tensors_of_any_load_go_first_then_the_oldest_load(
    make_loader: Callable[..., tuple[Loader, Ends]],
) -> None:
    old, new = (Bench(manifest_of([[(4096, f"{i}") for i in range(3)]], header=4096)) for _ in range(2))
    sharing(old, [new])
    gate = old.source.gate = new.source.gate = threading.Semaphore(0)
    new.source.entered = old.source.entered
    new.source.reads = old.source.reads
    new.source.number = 1
    made, ends = make_loader(1, 1 << 20, old.lock)
    made.start()
    made.add(old.load)
    assert old.source.entered.acquire(timeout=10)
    made.add(new.load)
    with old.lock:
        wanted = new.load.when_ready([2])
    for _ in range(6):
        gate.release()
    assert wanted.result(10) is None
    assert new.load.finished.result(10) is None
    assert [(number, at // 4096) for number, at in old.source.reads] == [(0, 1), (1, 3), (0, 2), (0, 3), (1, 1), (1, 2)]
    assert ends.loads == [old.load, new.load]


def test_a_load_that_fails_leaves_the_threads_to_the_next(make_loader: Callable[..., tuple[Loader, Ends]]) -> None:
    bad, good = Bench(LAYERS), Bench(LAYERS)
    sharing(bad, [good])
    bad.source.error = ReadError("the disk")
    made, ends = make_loader(2, 1 << 20, bad.lock)
    made.start()
    made.add(bad.load)
    with pytest.raises(ReadError, match="the disk"):
        bad.load.finished.result(10)
    made.add(good.load)
    assert good.load.finished.result(10) is None
    assert ends.loads == [bad.load, good.load]
    assert made.loads == ()
    assert len(bad.source.reads) <= 2, "nothing more was read after the failure"


def test_a_load_without_tasks_ends_at_once(make_loader: Callable[..., tuple[Loader, Ends]]) -> None:
    bench = Bench(manifest_of([[]]))
    made, ends = make_loader(1, 1 << 20, bench.lock)
    made.add(bench.load)
    assert bench.load.finished.result(0) is None
    assert ends.loads == [bench.load]


def test_closing_ends_what_is_under_way_and_fails_what_is_not(make_loader: Callable[..., tuple[Loader, Ends]]) -> None:
    first, second = Bench(LAYERS), Bench(LAYERS)
    sharing(first, [second])
    first.source.gate = threading.Semaphore(0)
    made, _ = make_loader(1, 1 << 20, first.lock)
    made.start()
    made.add(first.load)
    made.add(second.load)
    assert first.source.entered.acquire(timeout=10)
    closer = threading.Thread(target=made.close)
    closer.start()
    while not made._closed:
        pass
    first.source.gate.release()
    closer.join(10)
    assert not closer.is_alive()
    for load in (first.load, second.load):
        with pytest.raises(Closed, match="the pool closed while model was loading"):
            load.finished.result(0)
    assert second.source.reads == []


def test_a_load_that_comes_after_the_closing_fails_and_is_not_forgotten(
    make_loader: Callable[..., tuple[Loader, Ends]],
) -> None:
    bench = Bench(LAYERS)
    made, ends = make_loader(1, 1 << 20, bench.lock)
    made.close()
    made.start()
    assert made._threads == []
    made.add(bench.load)
    with pytest.raises(Closed):
        bench.load.finished.result(5)
    assert ends.loads == [bench.load]


def test_staging_that_cannot_be_had_is_told_to_who_starts(
    make_loader: Callable[..., tuple[Loader, Ends]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int) -> None:
        raise NativeError(f"cannot allocate {nbytes} bytes of staging memory: Cannot allocate memory", 12)

    made, _ = make_loader(2)
    with monkeypatch.context() as patch:
        patch.setattr(_native, "Staging", none_left)
        with pytest.raises(NativeError, match="staging memory"):
            made.start()
    made.start()
    assert len(made._threads) == 2


def test_everyone_gets_an_error_of_his_own() -> None:
    """A raised error keeps its frames, and a frame may hold a model: nobody is to hold another's."""
    bench = Bench(LAYERS)
    futures = [bench.load.when_ready([0]), bench.load.when_ready([0]), bench.load.when_ready(None)]
    error = NativeError("cannot seal", 12)
    bench.load.fail(error)
    bench.load.end(error)
    told = [future.exception(0) for future in futures]
    assert len({id(each) for each in (*told, error)}) == 4
    for each in told:
        assert isinstance(each, NativeError)
        assert (str(each), each.errno) == ("cannot seal", 12)
