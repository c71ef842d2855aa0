"""Loads: every byte once, wanted ones first, and whoever waits is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.load_bench import KIB, LAYERS, Bench, manifest_of, record_of
from tiermem import _native
from tiermem.errors import CapacityError, CheckpointChanged, DigestMismatch, NativeError, ReadError
from tiermem.load import plan_checks, plan_reads, readiness
from tiermem.types import PAGE_BYTES

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


@pytest.fixture
def staging() -> Iterator[_native.Staging]:
    made = _native.Staging(64 * KIB)
    yield made
    made.close()


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


def test_no_more_is_begun_than_the_source_is_good_for(staging: Any) -> None:
    bench = Bench(LAYERS)
    everything = len(Bench(LAYERS).tasks())
    bench.source.reads_at_once = 2
    begun = bench.tasks()
    assert len(begun) == 2
    assert not bench.load.done
    for _ in range(everything - 2):
        bench.load.perform(begun.pop(0), staging)
        bench.load.in_flight -= 1
        begun += bench.tasks()
        assert len(begun) == 2
    bench.source.reads_at_once = None
    assert bench.tasks() == []


def test_bytes_that_are_not_believed_are_read_again_and_no_others_with_them(staging: Any) -> None:
    honest = Bench(LAYERS)
    for task in honest.tasks():
        honest.load.perform(task, staging)
    bench = Bench(LAYERS)
    bench.record.digests[:] = honest.record.digests
    bench.source.lies = 1
    tasks = bench.tasks()
    first = next(task for task in tasks if task.parts)
    tasks.remove(first)
    bench.load.perform(first, staging)
    assert not bench.record.ready[list(first.tensors)].any()
    again = bench.load.next_task()
    assert again is not None
    assert len(again.tensors) == 1
    assert {part.tensor for part in again.parts} == set(again.tensors)
    for task in (again, *tasks):
        bench.load.perform(task, staging)
    assert bench.record.ready.all()
    assert sorted(bench.completed) == [0, 1, 2]
    assert [bench.bytes_of(i) for i in range(6)] == [honest.bytes_of(i) for i in range(6)]


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
        with pytest.raises(CapacityError, match=r"model: 2097152 bytes of memory for a could not be had.*--tier"):
            bench.load.perform(bench.tasks()[0], staging)


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
