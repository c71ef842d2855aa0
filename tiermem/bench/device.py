"""A device timed: what copies from host memory to it take, and allocations. What is timed is read back and compared.

Owns the host memory that is copied, which is a segment as a pool has them, and what is inside the clock.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from tiermem.device import Arena, Block, Copier, Device, Staging
from tiermem.device.backend import address_of, open_device
from tiermem.errors import DeviceUnavailable, DigestMismatch, Refused
from tiermem.segment import open_backing
from tiermem.types import PAGE_BYTES, pages_of
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch

IN_FLIGHT = (1, 2, 4)
CHUNK_BYTES = 256 << 20
"""As residencies ask for it."""

_PIECE_BYTES = 32 << 20
"""What is copied at once, about a large tensor of a layer; of less than _PIECES of them, a part."""
_PIECES = 8

_BACKENDS = ("torch_npu", "triton")

Wait = Callable[[], None]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What torch says of a device, and whether its runtime reads registered host memory."""

    name: str
    model: str
    capacity_bytes: int
    free_bytes: int
    registers: bool
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class CopyTiming:
    """`nbytes` went to the device one way, at most `in_flight` copies at once, in `seconds`, one a run."""

    way: str
    in_flight: int
    nbytes: int
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AllocationTiming:
    """A chunk of an arena was had from the device, one after the other."""

    nbytes: int
    seconds: tuple[float, ...]


def chosen_device(name: str | None) -> Device:
    """The device of that name, or the one that torch computes on. Raises DeviceUnavailable, and Refused for the
    simulated ACL of this project's tests."""
    if name is None:
        open_device("cpu")  # tells what is wrong with torch itself
        import torch

        found = torch.accelerator.current_accelerator()
        if found is None:
            raise DeviceUnavailable(
                "torch sees no accelerator here; name a device: npu:0, cuda:0, or cpu for a trial run"
            )
        name = f"{found.type}:{found.index or 0}"
    device = open_device(name)
    _refuse_simulated(device)
    return device


def _refuse_simulated(device: Device) -> None:
    """The simulated ACL says by its own functions that it is one."""
    try:
        library = ctypes.CDLL("libascendcl.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return  # no ACL in this process
    if device.type == "npu" and hasattr(library, "sim_acl_calls"):
        raise Refused(f"{device.name} is simulated (tests/sim_acl): no figure of it says anything; take a real device")


def facts_of(device: Device) -> DeviceFacts:
    """Raises DeviceLost."""
    import torch

    module: Any = torch.get_device_module(device.name)
    with explained(device, "asking for its name"):
        model = module.get_device_name(device.index) if hasattr(module, "get_device_name") else device.type
    with host_memory("auto", PAGE_BYTES) as memory:
        registration = device.register(memory)
        if registration is not None:
            registration.close()
    return DeviceFacts(
        device.name, str(model), device.capacity_bytes(), device.free_bytes(), registration is not None, _versions()
    )


def _versions() -> dict[str, str]:
    """Of torch, of the backends that are installed, and of the runtimes that torch names."""
    import torch

    found = {"torch": str(torch.__version__)}
    for runtime in ("cuda", "hip", "cann"):
        if version := getattr(torch.version, runtime, None):
            found[runtime] = str(version)
    for name in _BACKENDS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def host_memory(kind: str, nbytes: int) -> Iterator[memoryview]:
    """Random bytes in a segment on a backing of this kind, which nobody can write to. Raises ConfigError."""
    whole = max(1, pages_of(nbytes)) * PAGE_BYTES
    backing = open_backing(kind, None, whole)
    try:
        segment = backing.create("bench-device", whole)
        segment.prefault(threads=2)
        with segment.buffer() as memory:
            _fill(memory)
        segment.seal()
        with segment.buffer() as memory:
            yield memory[:nbytes]
        segment.close()
    finally:
        backing.close(keep=False)


def _fill(memory: memoryview) -> None:
    random = np.random.default_rng(0)
    words = np.frombuffer(memory, np.uint64)
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)]
        part[:] = random.integers(0, 1 << 64, len(part), np.uint64)


class CopyBench:
    """Copies of `source` to a block as large as it, on a device that has so much."""

    def __init__(self, device: Device, source: memoryview, runs: int) -> None:
        """Raises DeviceFull, DeviceLost."""
        self.device = device
        self._source, self._runs = source, runs
        self._piece = max(1, min(_PIECE_BYTES, source.nbytes // _PIECES))
        self._digest = blake3(source).digest()
        self._arena = Arena(device, source.nbytes + PAGE_BYTES)
        self._copier: Copier | None = None
        try:
            self._block = self._arena.allocate(source.nbytes)
            self._staging = Staging(device)
            self._copier = Copier(device, self._staging)
        except BaseException:
            self.close()
            raise

    def ways(self) -> Iterator[CopyTiming]:
        """Every way that this device has, in the order in which it should get slower.

        Raises DigestMismatch where bytes did not arrive, CopyFailed, DeviceLost.
        """
        registration = self.device.register(self._source)
        if registration is not None:
            with closing(registration):
                yield from self._several("registered", self._ordered)
        yield from self._several("staged", self._ordered)
        pageable = _tensor(self._source)
        yield self._timed("pageable", 1, lambda start, end: self._direct(pageable, start, end))

    def _several(self, way: str, issue: Callable[[int, int], Wait]) -> Iterator[CopyTiming]:
        for in_flight in IN_FLIGHT:
            yield self._timed(way, in_flight, issue)

    def _timed(self, way: str, in_flight: int, issue: Callable[[int, int], Wait]) -> CopyTiming:
        seconds = []
        for _ in range(self._runs):
            self._clear()
            begin = time.perf_counter()
            self._pass(in_flight, issue)
            seconds.append(time.perf_counter() - begin)
            check_arrived(self.device, self._block, self._digest, way)
        return CopyTiming(way, in_flight, self._source.nbytes, tuple(seconds))

    def _pass(self, in_flight: int, issue: Callable[[int, int], Wait]) -> None:
        """All of the source once, in pieces."""
        waits: deque[Wait] = deque()
        for start in range(0, self._source.nbytes, self._piece):
            if len(waits) == in_flight:
                waits.popleft()()
            waits.append(issue(start, min(start + self._piece, self._source.nbytes)))
        for wait in waits:
            wait()

    def _ordered(self, start: int, end: int) -> Wait:
        assert self._copier is not None
        return self._copier.copy(self._source[start:end], self._block, start).result

    def _direct(self, source: torch.Tensor, start: int, end: int) -> Wait:
        """A copy by torch alone, from memory that the device's runtime knows nothing of."""
        with explained(self.device, "a copy from pageable memory"):
            self._block.view[start:end].copy_(source[start:end])
        return lambda: waited(self.device)

    def _clear(self) -> None:
        """What an earlier run left must not look as if this one had brought it."""
        with explained(self.device, "clearing memory"):
            self._block.view.zero_()
        waited(self.device)

    def close(self) -> None:
        """Give all memory back."""
        if self._copier is not None:
            self._copier.close()
            self._staging.close()
        self._arena.close()


def time_allocations(device: Device, nbytes: int, runs: int) -> AllocationTiming:
    """Have a chunk of an arena from the device and give it back, so often. Raises DeviceFull, DeviceLost,
    DigestMismatch where it does not keep what is written to it."""
    seconds = []
    content = np.random.default_rng(1).bytes(min(nbytes, PAGE_BYTES))
    for _ in range(runs):
        arena = Arena(device, nbytes, nbytes)
        begin = time.perf_counter()
        block = arena.allocate(nbytes)
        waited(device)
        seconds.append(time.perf_counter() - begin)
        with explained(device, "a copy to a new chunk"):
            block.view[-len(content) :].copy_(_tensor(memoryview(content)))
            arrived = block.view[-len(content) :].cpu().numpy()
        if arrived.tobytes() != content:
            raise DigestMismatch(f"a chunk of {format_bytes(nbytes)} of {device.name} lost what was written to it")
        del block, arrived
        arena.close()
        device.release_cached()
    return AllocationTiming(nbytes, tuple(seconds))


def check_arrived(device: Device, block: Block, digest: bytes, way: str) -> None:
    """Read a block back. Raises DigestMismatch where its bytes have another digest, CopyFailed, DeviceLost."""
    with explained(device, "reading back"):
        found = blake3(block.view.cpu().numpy().data).digest()
    if found != digest:
        raise DigestMismatch(
            f"{format_bytes(block.nbytes)} on {device.name} differ from what was copied there ({way}); these timings "
            "are void, and nothing on this device can be trusted"
        )


def waited(device: Device) -> None:
    """Return when the current stream has done all of its work. Raises CopyFailed, DeviceLost."""
    with explained(device, "work"):
        event = device.event()
        event.record(device.current_stream())
        event.synchronize()


@contextmanager
def explained(device: Device, doing: str) -> Iterator[None]:
    """Errors of torch are the device's: raises CopyFailed, DeviceLost."""
    try:
        yield
    except RuntimeError as error:
        raise device.explain(error, f"{doing} on {device.name}") from error


def _tensor(content: memoryview) -> torch.Tensor:
    """Over memory that is only read; torch takes none such without a warning."""
    import torch

    seen = (ctypes.c_ubyte * content.nbytes).from_address(address_of(content))
    return torch.frombuffer(seen, dtype=torch.uint8)
