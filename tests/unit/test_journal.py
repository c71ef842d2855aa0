"""The journal: who watches gets what happens from then on, in order; who does not keep up is told what was lost."""

from __future__ import annotations

import threading

import pytest

from tests.frames import frames_of
from tiermem import journal as journal_module
from tiermem.journal import Journal
from tiermem.recording import frame


def exit_frame(pid: int) -> bytes:
    return frame("exit", 1.0, pid=pid)


def pids(data: bytes) -> list[int]:
    return [fields["pid"] for fields in frames_of(data)]


def test_a_watcher_gets_the_state_and_then_what_happens_until_it_leaves() -> None:
    journal = Journal()
    journal.pass_on(exit_frame(1))
    woken: list[None] = []
    watcher = journal.watch(lambda: woken.append(None), [exit_frame(2), exit_frame(3)])
    journal.tell("exit", pid=4)
    assert len(woken) == 3
    data, dropped = watcher.take()
    assert (pids(data), dropped) == ([2, 3, 4], 0)
    assert watcher.take() == (b"", 0)
    journal.unwatch(watcher)
    journal.unwatch(watcher)
    journal.tell("exit", pid=5)
    assert watcher.take() == (b"", 0)


def test_nothing_is_made_for_nobody() -> None:
    journal = Journal()
    journal.tell("no such kind", nonsense=1)
    assert not journal.watched
    watcher = journal.watch(lambda: None)
    assert journal.watched
    with pytest.raises(ValueError, match="no such kind"):
        journal.tell("no such kind", nonsense=1)
    journal.unwatch(watcher)
    assert not journal.watched


def test_a_watcher_that_nobody_holds_is_forgotten() -> None:
    journal = Journal()
    journal.watch(lambda: pytest.fail("nobody is there"))
    assert not journal.watched
    journal.tell("exit", pid=1)
    kept = journal.watch(lambda: None)
    assert len(journal._watchers) == 1
    journal.tell("exit", pid=2)
    assert pids(kept.take()[0]) == [2]


def test_each_watcher_takes_for_itself() -> None:
    journal = Journal()
    first, second = journal.watch(lambda: None), journal.watch(lambda: None)
    journal.tell("exit", pid=1)
    assert pids(first.take()[0]) == [1]
    journal.unwatch(first)
    journal.tell("exit", pid=2)
    assert pids(second.take()[0]) == [1, 2]
    assert first.take() == (b"", 0)


def test_who_does_not_read_loses_what_has_no_room_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    one = len(exit_frame(1))
    monkeypatch.setattr(journal_module, "QUEUE_BYTES", 4 * one)
    journal = Journal()
    slow, quick = journal.watch(lambda: None), journal.watch(lambda: None)
    seen = []
    for pid in range(10):
        journal.tell("exit", pid=pid)
        seen += pids(quick.take()[0])
    assert seen == list(range(10))
    data, dropped = slow.take()
    assert (pids(data), dropped) == ([0, 1, 2, 3], 6)
    journal.tell("exit", pid=10)
    data, dropped = slow.take()
    assert (pids(data), dropped) == ([10], 0), "there is room again, and the loss was told once"


def test_a_take_is_not_larger_than_a_message_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    one = len(exit_frame(1))
    monkeypatch.setattr(journal_module, "BATCH_BYTES", 3 * one)
    journal = Journal()
    watcher = journal.watch(lambda: None, map(exit_frame, range(7)))
    assert [pids(watcher.take()[0]) for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6], []]


def test_frames_of_many_threads_arrive_whole() -> None:
    journal = Journal()
    watcher = journal.watch(lambda: None)
    tellers = [
        threading.Thread(target=lambda first=first: [journal.tell("exit", pid=first + i) for i in range(200)])  # type: ignore[misc]
        for first in range(0, 800, 200)
    ]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join()
    data, dropped = watcher.take()
    assert (sorted(pids(data)), dropped) == (list(range(800)), 0)
