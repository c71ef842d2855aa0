"""Journal: what happens in a pool, told as frames of a recording to whoever watches. Keeps nothing for who comes later.

Owns one bounded queue per watcher. Telling takes microseconds and never waits; a watcher that does not keep up loses
frames, and is told how many.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from tiermem.recording import frame

QUEUE_BYTES = 64 << 20
"""Frames of one watcher that wait to be taken."""

BATCH_BYTES = 4 << 20
"""What one take returns, but for the last frame in it."""


class Watcher:
    """One reader of the journal. `wake` is called, from any thread, when there is something to take."""

    def __init__(self, wake: Callable[[], object]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._frames: deque[bytes] = deque()
        self._nbytes = 0
        self._dropped = 0

    def put(self, data: bytes) -> None:
        with self._lock:
            if self._nbytes + len(data) > QUEUE_BYTES:
                self._dropped += 1
                return
            self._frames.append(data)
            self._nbytes += len(data)
        self._wake()

    def take(self) -> tuple[bytes, int]:
        """The oldest frames, one after another (empty: none are left), and how many were lost since the last take."""
        with self._lock:
            taken = []
            room = BATCH_BYTES
            while self._frames and room > 0:
                taken.append(self._frames.popleft())
                room -= len(taken[-1])
            dropped, self._dropped = self._dropped, 0
            data = b"".join(taken)
            self._nbytes -= len(data)
        return data, dropped


class Journal:
    """Of one pool. Any thread may tell. A watcher that nobody holds any more is forgotten: who asked for it may have
    gone before it was made."""

    def __init__(self) -> None:
        self._watchers: tuple[weakref.ref[Watcher], ...] = ()
        self._lock = threading.Lock()

    @property
    def watched(self) -> bool:
        """Whether anybody watches; building what to tell can be left out where nobody does."""
        return any(watcher() is not None for watcher in self._watchers)

    def tell(self, kind: str, **fields: Any) -> None:
        """Something happened now; `fields` are those of the kind in tiermem.recording."""
        if self.watched:
            self.pass_on(frame(kind, time.monotonic(), **fields))

    def pass_on(self, data: bytes) -> None:
        """A frame that is made already."""
        for reference in self._watchers:
            if watcher := reference():
                watcher.put(data)

    def watch(self, wake: Callable[[], object], before: Iterable[bytes] = ()) -> Watcher:
        """A new watcher, whose first frames are `before`: the state that later frames change."""
        watcher = Watcher(wake)
        for data in before:
            watcher.put(data)
        with self._lock:
            self._watchers = (*self._live_but(None), weakref.ref(watcher))
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers = self._live_but(watcher)

    def _live_but(self, watcher: Watcher | None) -> tuple[weakref.ref[Watcher], ...]:
        return tuple(other for other in self._watchers if other() not in (None, watcher))
