"""The loader: its threads, their memory, and the order of loads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.unit.load_bench import KIB, LAYERS, Bench, manifest_of
from tiermem import _native
from tiermem.errors import Closed, NativeError, ReadError
from tiermem.load import Load
from tiermem.loader import Loader


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
