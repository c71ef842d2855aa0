"""Loader: the threads that carry out loads, each with its own staging memory. Owns no bytes of any model.

All loads share them: wanted tensors of any load first, then the oldest load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tiermem import _native
from tiermem.errors import Closed
from tiermem.load import Load, Task
from tiermem.types import PAGE_BYTES

BLOCK_BYTES = 4 << 20
"""Bytes of a file that one task reads: enough that Python's share of a task does not count, and little enough that the
threads together read a file nearly from front to back, which devices like."""

_STAGING_BYTES_MOST = PAGE_BYTES
"""Staging memory of a thread. On one page, a read has few segments; more memory does not make it faster."""


class Loader:
    """`threads` threads within `staging_bytes` of staging memory in all. `lock` is the pool's."""

    def __init__(self, threads: int, staging_bytes: int, lock: threading.RLock, on_end: Callable[[Load], None]) -> None:
        self.staging_bytes = 0
        self._per_thread = min(_STAGING_BYTES_MOST, staging_bytes // threads // 4096 * 4096)
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition(lock)
        self._on_end = on_end
        self._loads: list[Load] = []
        self._closed = False

    @property
    def loads(self) -> tuple[Load, ...]:
        """Loads in progress, oldest first. Holds the lock."""
        return tuple(self._loads)

    def start(self) -> None:
        """Start the threads that do not run yet. Raises NativeError where there is no memory to stage reads in."""
        with self._changed:
            while len(self._threads) < self._count and not self._closed:
                staging = _native.Staging(self._per_thread)
                self.staging_bytes += staging.nbytes
                name = f"tiermem-load-{len(self._threads)}"
                thread = threading.Thread(target=self._run, args=(staging,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def add(self, load: Load) -> None:
        """Begin a load, once the threads were started; after `close` it fails."""
        with self._changed:
            self._loads.append(load)
            if self._closed:
                load.fail(_closed(load))
            self._changed.notify_all()
        self.settle(load)

    def settle(self, load: Load) -> None:
        """End the load if nothing of it is left to do. The lock must not be held."""
        with self._changed:
            if not load.done or load not in self._loads:
                return
            self._loads.remove(load)
        self._on_end(load)

    def close(self) -> None:
        """End the threads after the tasks that they are at; loads that are left fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for load in self.loads:
            with self._changed:
                load.fail(_closed(load))
            self.settle(load)

    def _take(self) -> tuple[Load, Task] | None:
        with self._changed:
            while not self._closed:
                for load in sorted(self._loads, key=lambda load: not load.urgent):
                    task = load.next_task()
                    if task is not None:
                        return load, task
                self._changed.wait()
            return None

    def _run(self, staging: _native.Staging) -> None:
        try:
            while (taken := self._take()) is not None:
                load, task = taken
                try:
                    load.perform(task, staging)
                except Exception as error:
                    with self._changed:
                        load.fail(error)
                finally:
                    with self._changed:
                        load.in_flight -= 1
                self.settle(load)
        finally:
            staging.close()


def _closed(load: Load) -> Closed:
    return Closed(f"the pool closed while {load.record.name} was loading")
