"""Ten thousand switches between models on one device, while copies fail, memory is short and the engine takes some of
it: no byte is wrong, and nothing is left behind."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3

from tests.bench.switching import bytes_of, digests_of, write_models
from tests.integration.conftest import PoolMaker
from tests.unit.test_device_backend import Mark, SlowDevice
from tiermem.device import Device, Event, Residency, Stream, Switched, Switcher, headroom, switcher
from tiermem.errors import CopyFailed, DeviceFull
from tiermem.model import Model

SWITCHES = 5000
"""On each of two devices."""

UNIT = 1024
RESERVE = 1 << 20


class Unreliable(Device):
    """Of its copies some fail, and of its allocations; what it has free comes and goes. `held_bytes`: what it gave and
    did not get back; `lost`: how often which of these happened; `side`: the stream of the copies."""

    def unreliable(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.troubled, self.dry = False, 0
        self.held_bytes = 0
        self.lost = Counter[str]()
        self.side: Callable[[], Stream | None] = lambda: None

    def happens(self, what: str, probability: float) -> bool:
        if not self.troubled or self.chance.random() >= probability:
            return False
        self.lost[what] += 1
        return True

    def empty(self, nbytes: int) -> torch.Tensor:
        if nbytes and not self.dry and self.happens("memory", 0.2):
            self.dry = 10
        if nbytes and self.dry:
            self.dry -= 1
            raise DeviceFull("no memory", nbytes)
        memory = super().empty(nbytes)
        self.held_bytes += nbytes
        weakref.finalize(memory.untyped_storage(), self._returned, nbytes)
        return memory

    def _returned(self, nbytes: int) -> None:
        self.held_bytes -= nbytes

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        if self.happens("copy", 0.005):
            raise RuntimeError("bus error")
        super().copy(target, source, stream)

    def free_bytes(self) -> int:
        return RESERVE - 20 * UNIT if self.happens("engine", 0.03) else RESERVE << 10


class Cpu(Unreliable):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), torch.cpu)
        self.unreliable(seed=1)

    def compute(self, check: Any) -> None:
        check()

    def settle(self) -> None:
        pass

    def close(self) -> None:
        pass


class Slow(Unreliable, SlowDevice):
    """Copies also fail later, when the device does them: the events that are recorded behind them say so from then on,
    for ever."""

    def __init__(self) -> None:
        SlowDevice.__init__(self)
        self.unreliable(seed=2)
        self.broken = set[Stream | None]()

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def event(self) -> Event:
        made: Any = super().event()
        genuine = made.record

        def record(stream: Any) -> None:
            if stream is self.side() and self.happens("stream", 0.002):
                self.broken.add(stream)
            if stream in self.broken:
                stream.enqueue("fail", partial(setattr, made, "fault", RuntimeError("uncorrectable")))
            genuine(stream)

        made.record = record
        return made  # type: ignore[no-any-return]

    def compute(self, check: Any) -> None:
        """Checks when the compute stream comes to it."""
        self.module.compute.enqueue("compute", check)

    def settle(self) -> None:
        done = Mark()
        done.record(self.module.compute)
        done.synchronize()


@pytest.fixture(params=[Cpu, Slow])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cpu | Slow]:
    made = request.param()
    monkeypatch.setattr(switcher, "open_device", lambda name: made)
    monkeypatch.setattr(headroom, "_LOOK_S", 0.0)
    monkeypatch.setattr(headroom, "_AGAIN_S", 0.0)
    yield made
    made.close()


@contextmanager
def opened(pools: PoolMaker, directory: Path) -> Iterator[list[Model]]:
    pool = pools()
    models = [pool.open(path) for path in write_models(directory, UNIT)]
    for model in models:
        model.wait()
    yield models
    for model in models:
        model.close()


class Walk:
    """Switches at random, and what came of them."""

    def __init__(self, device: Cpu | Slow, models: list[Model]) -> None:
        self.device, self.chance = device, random.Random(0)
        self.digests = digests_of(models)
        self.switcher = Switcher(
            "device", bytes_of(models) // 3, reserve_bytes=RESERVE, staging_bytes=8 * UNIT, chunk_bytes=12 * UNIT
        )
        for model in models:
            self.switcher.add(model.name, model)
        self.wrong: list[str] = []
        self.failed = Counter[str]()
        self.checked = self.copied = self.shared = 0
        device.side = lambda: self.switcher.residency._copier.stream
        _unreliable_arena(device, self.switcher.residency)

    def step(self) -> None:
        names = self.switcher.names
        try:
            if self.chance.random() < 0.3:
                self.switcher.prefetch(self.chance.choice(names))
            switched = self.switcher.switch(self.chance.choice(names), block=self.chance.random() < 0.3)
        except (CopyFailed, DeviceFull) as error:
            self.failed[type(error).__name__] += 1
            assert self.switcher.current is None
        else:
            assert self.switcher.current == switched.name
            self.copied += switched.bytes_copied
            self.shared += switched.bytes_shared
            self.read_back(switched)

    def read_back(self, switched: Switched) -> None:
        """In the compute stream: by the time that it is read, the switcher may be several models further."""
        name = self.chance.choice([*switched.tensors])
        tensor, digest = switched.tensors[name], self.digests[switched.name, name]

        def check() -> None:
            self.checked += 1
            if blake3(tensor.numpy().data).digest() != digest:
                self.wrong.append(f"{switched.name} {name}")

        self.device.compute(check)


def _unreliable_arena(device: Unreliable, residency: Residency) -> None:
    """Memory in pieces: an allocation fails though there is room."""
    genuine = residency._arena.allocate

    def allocate(nbytes: int) -> Any:
        if device.happens("piece", 0.03):
            raise DeviceFull("no piece is large enough", nbytes)
        return genuine(nbytes)

    residency._arena.allocate = allocate  # type: ignore[method-assign]


def test_ten_thousand_switches_with_failures(device: Cpu | Slow, embedded: PoolMaker, tmp_path: Path) -> None:
    with opened(embedded, tmp_path) as models:
        walk = Walk(device, models)
        residency = walk.switcher.residency
        budget = residency.budget_bytes
        device.troubled = True
        for number in range(SWITCHES):
            walk.step()
            if number % 50 == 0:
                residency.check()
        device.troubled, device.dry = False, 0
        device.settle()
        residency.check()
        print(f"{walk.failed=} {device.lost=} {walk.checked=} {walk.copied=} {walk.shared=} {budget=}")
        assert not walk.wrong
        assert walk.checked == SWITCHES - walk.failed.total() > SWITCHES / 2
        assert set(walk.failed) == {"CopyFailed", "DeviceFull"}
        assert {"copy", "memory", "piece", "engine"} <= set(device.lost)
        assert residency.peak_bytes <= budget
        for name in walk.switcher.names:
            assert walk.switcher.switch(name, block=True).name == name
        assert residency.budget_bytes == budget, "what was lowered is as before when nothing is lacking"
        walk.switcher.close()
        residency.check()
        assert residency.used_bytes == residency.reserved_bytes == residency.pinned_bytes == 0
        gc.collect()
        assert device.held_bytes == 0
