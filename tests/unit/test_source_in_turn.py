"""Sources in turn: what the first cannot bring the second does, from many threads at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tiermem.errors import CheckpointChanged, Closed, DigestMismatch, ReadError
from tiermem.source.fill import Fill
from tiermem.source.in_turn import SourcesInTurn

FILLS = [Fill(0, 1, 0, 0, 0, 0)]


class Told:
    """A source that fails as it is told, and counts."""

    whole_segments = False
    reads_at_once: int | None = None

    def __init__(self, error: Exception | None = None, believed: bool = True) -> None:
        self.error, self.believed = error, believed
        self.reads = self.checks = self.closed = 0
        self._lock = threading.Lock()

    def read(self, file: int, fills: object, staging: object) -> None:
        with self._lock:
            self.reads += 1
        if self.error is not None:
            raise self.error

    def disbelieve(self, tensor: int) -> bool:
        return self.believed

    def check(self) -> None:
        self.checks += 1

    def close(self) -> None:
        self.closed += 1


def read(sources: SourcesInTurn) -> None:
    sources.read(0, FILLS, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ReadError("gone"), CheckpointChanged("anew"), DigestMismatch("other")])
def test_the_second_brings_what_the_first_cannot_and_all_that_follows(error: Exception) -> None:
    first, second = Told(error), Told()
    sources = SourcesInTurn("m", [("peer", first), ("disk", second)])
    for _ in range(3):
        read(sources)
    assert (first.reads, second.reads) == (1, 3)
    sources.check()
    assert (first.checks, second.checks) == (0, 1), "what the first brought has its digest"
    sources.close()
    assert (first.closed, second.closed) == (1, 1)


def test_the_last_one_says_why_not() -> None:
    sources = SourcesInTurn("m", [("peer", Told(ReadError("first"))), ("disk", Told(ReadError("second")))])
    with pytest.raises(ReadError, match="second"):
        read(sources)


def test_a_pool_that_closes_asks_nobody_else() -> None:
    second = Told()
    with pytest.raises(Closed):
        read(SourcesInTurn("m", [("peer", Told(Closed("the pool is closed"))), ("disk", second)]))
    assert second.reads == 0


def test_threads_that_fail_together_go_on_together() -> None:
    first, second, third = Told(ReadError("gone")), Told(), Told()
    sources = SourcesInTurn("m", [("a", first), ("b", second), ("c", third)])
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: read(sources), range(200)))
    assert (second.reads, third.reads) == (200, 0)


def test_who_is_not_believed_may_have_another_behind_it() -> None:
    first, second = Told(believed=True), Told(believed=False)
    sources = SourcesInTurn("m", [("peer", first), ("disk", second)])
    assert sources.disbelieve(0)
    read(sources)
    assert first.reads == 1, "it knows another peer"
    first.believed = False
    sources.read(0, [FILLS[0]._replace(tensor=1)], None)  # type: ignore[arg-type]
    assert sources.disbelieve(0)
    read(sources)
    assert second.reads == 1
    assert sources.disbelieve(1), "the first brought it, the second is asked now"
    assert not sources.disbelieve(0)
