"""Many threads at once that want more than fits: nothing wrong is read, and nothing is lost."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from blake3 import blake3

from tests.conftest import Checkpoint, CheckpointWriter, dram, until
from tests.integration.conftest import PoolMaker
from tests.integration.gate import in_tmpfs, used
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CapacityError, ModelNotFound, ReadError, Refused
from tiermem.source.file import FileSource
from tiermem.types import PAGE_BYTES

MIB = 1 << 20


class Crowd:
    """Threads that open, read, load, evict, pin and remove at random, and verify what they read."""

    def __init__(self, pool: EmbeddedPool, models: list[Checkpoint], seconds: float) -> None:
        self.pool = pool
        self.models = models
        self.digests = [
            {name: blake3(array.tobytes()).digest() for name, array in each.tensors.items()} for each in models
        ]
        self.until_s = time.monotonic() + seconds
        self.reads = 0
        self.refused = 0
        self.errors: list[BaseException] = []

    def rush(self, acts: Sequence[Callable[[random.Random], None]]) -> None:
        """Each act again and again on a thread of its own, until the time is over."""
        threads = [threading.Thread(target=self.run, args=each, daemon=True) for each in enumerate(acts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        assert self.errors == []

    def run(self, seed: int, act: Callable[[random.Random], None]) -> None:
        chance = random.Random(seed)
        while time.monotonic() < self.until_s and not self.errors:
            try:
                act(chance)
            except (CapacityError, Refused, ModelNotFound):
                self.refused += 1
            except BaseException as error:
                self.errors.append(error)

    def read(self, chance: random.Random) -> None:
        number = chance.randrange(len(self.models))
        model = self.pool.open(self.models[number].path)
        names = chance.sample(sorted(model), 3)
        for name in names:
            array = model[name]
            assert blake3(array.tobytes()).digest() == self.digests[number][name], name
            self.reads += 1
        if chance.random() < 0.5:
            model.close()
            assert blake3(array.tobytes()).digest() == self.digests[number][names[-1]]

    def load(self, chance: random.Random) -> None:
        self.pool.load(chance.choice(self.models).path)

    def disturb(self, chance: random.Random) -> None:
        name = chance.choice(self.models).path.name
        if chance.random() < 0.3:
            self.pool.pin(name)
            self.pool.unpin(name)
        chance.choice((self.pool.evict, self.pool.remove, self.pool.status))(name)
        time.sleep(0.002)


def test_a_crowd_that_wants_more_than_fits(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    models = [checkpoint(f"m{i}", layers=2 + i % 3, kib=32 + 200 * (i % 2), seed=i) for i in range(6)]
    pool = embedded(tier=dram(9 * PAGE_BYTES), spare="4MiB", read_threads=3)
    crowd = Crowd(pool, models, seconds=4)
    crowd.rush([crowd.read] * 5 + [crowd.load] * 2 + [crowd.disturb])
    assert crowd.reads > 100
    gc.collect()
    until(lambda: pool.status()["pool"]["leases"] == 0 and not pool._pool.loads())
    pool._pool.check()
    status = pool.status()
    assert used(pool) == sum(model["resident_bytes"] for model in status["models"]) <= 9 * PAGE_BYTES
    if status["pool"]["backing"] == "tmpfs":
        until(lambda: in_tmpfs(pool) <= 9 * PAGE_BYTES)


def test_loads_that_fail_at_random_leave_nothing_wrong(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fifth read fails: whoever gets bytes gets right ones, and the books balance."""
    models = [checkpoint(f"m{i}", layers=3, seed=i) for i in range(4)]
    pool = embedded(tier=dram(8 * PAGE_BYTES), read_threads=3)
    read, chance, lock = FileSource.read, random.Random(7), threading.Lock()

    def flaky(source: FileSource, *args: Any) -> None:
        with lock:
            bad = chance.random() < 0.2
        if bad:
            raise ReadError("a bad sector")
        read(source, *args)

    monkeypatch.setattr(FileSource, "read", flaky)
    crowd = Crowd(pool, models, seconds=2)
    failures: list[ReadError] = []

    def read_or_fail(chance: random.Random) -> None:
        try:
            crowd.read(chance)
        except ReadError as error:
            failures.append(error)

    crowd.rush([read_or_fail] * 5 + [crowd.disturb])
    assert crowd.reads > 50
    assert failures
    failures.clear()
    gc.collect()
    until(lambda: pool.status()["pool"]["leases"] == 0 and not pool._pool.loads())
    pool._pool.check()
    assert used(pool) == sum(model["resident_bytes"] for model in pool.status()["models"])
