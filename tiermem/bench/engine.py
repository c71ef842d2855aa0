"""Engines timed: each loads one checkpoint by itself and through the pool, in turns, every time in a fresh process.

Owns the order of the processes, what the pool has before each, and the comparison of the answers. Never prints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tiermem.bench import page_cache
from tiermem.bench.engine_cases import ATTACH, EXPORT, OWN, POPULATE, WAYS, Engine
from tiermem.bench.engine_memory import memory_of
from tiermem.bench.engine_process import EngineProcess
from tiermem.bench.samples import Samples
from tiermem.errors import DigestMismatch, ModelNotFound, Refused
from tiermem.types import Manifest

if TYPE_CHECKING:
    from tiermem.client import Client

_RELEASE_S = 20.0
"""Leases of a process that ended are gone a moment later, and a seal that it asked for may still be under way."""


@dataclass(frozen=True, slots=True)
class EngineTiming:
    """One process. `private_bytes` and `pss_bytes` are of all of it, after its first output."""

    load_s: float
    first_output_s: float
    private_bytes: int
    pss_bytes: int


@dataclass(frozen=True, slots=True)
class Crowd:
    """`processes` that held the model at the same time, after the first output of each; sums over them.

    `shared_bytes` are of shared memory and counted by PSS, with the daemon's part: every page of it once. `pool_bytes`
    is what one copy of the weights takes in the pool.
    """

    processes: int
    private_bytes: int
    pss_bytes: int
    shared_bytes: int
    pool_bytes: int


@dataclass(frozen=True, slots=True)
class EngineTimings:
    """What one engine took, by way of loading, in the order of the runs; `crowds` only if there were any."""

    ways: dict[str, tuple[EngineTiming, ...]]
    crowds: dict[str, Crowd]

    def samples(self, way: str, figure: str) -> Samples:
        return Samples.of([getattr(timing, figure) for timing in self.ways[way]])


class EngineBench:
    """Of one checkpoint, with one daemon. `room` is a directory for what the engines' processes share."""

    def __init__(self, client: Client, manifest: Manifest, room: Path, cold: bool) -> None:
        self._client, self._manifest, self._room, self._cold = client, manifest, room, cold
        self._files = [file.path for file in manifest.files]
        self._found = self._models()
        self._answer: object = None

    def time(
        self, engine: type[Engine], path: Path, runs: int, processes: int, done: Callable[[], None]
    ) -> EngineTimings:
        """Pairs of `runs`, and at the end `processes` at once where that is more than one; `done` after each step.

        Raises DigestMismatch where two answers differ, Refused where a process fails or the pool had the model before,
        Unusable where the engine cannot be imported.
        """
        taken: dict[str, list[EngineTiming]] = {way: [] for way in WAYS}
        crowds = {}
        self._answer = None
        with self._as_found_afterwards():
            for _ in range(runs):
                for way in WAYS:
                    taken[way].append(self._alone(engine.name, str(path), way))
                    done()
            if processes > 1:
                for way in (OWN, ATTACH):
                    crowds[way] = self._together(engine.name, str(path), way, processes)
                    done()
        return EngineTimings({way: tuple(timings) for way, timings in taken.items()}, crowds)

    def _alone(self, engine: str, path: str, way: str) -> EngineTiming:
        if way == POPULATE:
            self._forget()
            if name := self._checkpoint():
                self._client.evict(name)
        if way != ATTACH:
            page_cache.drop(self._files) if self._cold else page_cache.fill(self._files)
        before = self._models()
        with self._process(engine, path, way) as process:
            process.go()
            took = process.loaded()
            memory = process.memory()
            self._compare(engine, way, process.answer())
        if way == POPULATE and self._models() == before:
            raise Refused(
                f"the pool had the weights for {engine} before it was to get them; unload the images of "
                f"{self._manifest.path} and time again"
            )
        return EngineTiming(took["load_s"], took["first_output_s"], memory["private"], memory["pss"])

    def _together(self, engine: str, path: str, way: str, count: int) -> Crowd:
        with ExitStack() as stack:
            processes = [stack.enter_context(self._process(engine, path, way)) for _ in range(count)]
            for process in processes:
                process.go()
            for process in processes:
                process.loaded()
            # Only now: while one of them still loads, another's pages may look private.
            memories = [process.memory() for process in processes]
            daemon = memory_of(self._client.status()["pool"]["pid"])["shmem_pss"] if way != OWN else 0
            for process in processes:
                self._compare(engine, way, process.answer())
        private, pss = (sum(memory[part] for memory in memories) for part in ("private", "pss"))
        shared = daemon + sum(memory["shmem_pss"] for memory in memories)
        return Crowd(count, private, pss, shared, self._held_bytes() if way != OWN else 0)

    @contextmanager
    def _process(self, engine: str, path: str, way: str) -> Iterator[EngineProcess]:
        process = EngineProcess(engine, path, way, self._client.address, self._room)
        try:
            yield process
        finally:
            process.end()

    def _compare(self, engine: str, way: str, answer: object) -> None:
        if self._answer is None:
            self._answer = answer
        if answer != self._answer:
            raise DigestMismatch(
                f"{engine} answers otherwise when it loads by way of {way}: {_short(answer)}, not "
                f"{_short(self._answer)}; these timings are void, report it with the output of tiermem status --json"
            )

    @contextmanager
    def _as_found_afterwards(self) -> Iterator[None]:
        resident = self._checkpoint()
        try:
            yield
        finally:
            self._forget()
            if resident is not None:
                self._client.load(self._manifest.path)

    def _models(self) -> dict[str, int]:
        """Name -> bytes in memory."""
        return {model["name"]: model["resident_bytes"] for model in self._client.status()["models"]}

    def _held_bytes(self) -> int:
        """What the pool has in memory of the checkpoint and its images."""
        known = self._found.keys() - {self._checkpoint()}
        return sum(nbytes for name, nbytes in self._models().items() if name not in known)

    def _checkpoint(self) -> str | None:
        """The name of the checkpoint's own model, if it is in memory."""
        models = self._client.status()["models"]
        found = (m["name"] for m in models if m["identity"] == self._manifest.identity and m["resident_bytes"])
        return next(found, None)

    def _forget(self) -> None:
        """Take out of the pool what these processes brought into it. Raises Refused where others read it by now."""
        from tiermem.export import undo

        if (self._room / EXPORT).exists():
            undo(self._client, self._room / EXPORT)
        deadline = time.monotonic() + _RELEASE_S
        while new := self._models().keys() - self._found.keys():
            for name in new:
                try:
                    with suppress(ModelNotFound):
                        self._client.remove(name)
                except Refused:
                    if time.monotonic() > deadline:
                        raise
            time.sleep(0.02)


def _short(answer: object) -> str:
    text = str(answer)
    return text if len(text) < 80 else text[:77] + "..."
