"""Device: an accelerator's memory, streams and events, by torch's device-generic API.

Owns what torch is asked and what its errors mean; `npu`, `cuda` and `cpu` go one way. Never waits for a whole device:
only `release_cached`, by which memory leaves the process, may have its runtime do so.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import time
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tiermem import host
from tiermem.errors import CopyFailed, DeviceFull, DeviceLost, DeviceUnavailable, TiermemError
from tiermem.units import format_bytes

if TYPE_CHECKING:
    import torch

ALIGN = 512
"""Device memory starts at a multiple of this: what CUDA and CANN align their own allocations to."""

_REGISTER_READ_ONLY = 8
"""cudaHostRegisterReadOnly: the device only reads, so that memory that this process may not write can be registered."""

_STALL_S = 1.0
"""How long an event may be waited for before it is asked whether the device still does what it is given."""

_ANSWER_S = 5.0
"""A device that within this time does nothing on a stream that has nothing else to do does nothing more."""

_NAME = re.compile(r"([a-z]+)(?::([0-9]+))?")


class Stream(Protocol):
    """A queue of work on a device, as torch has it."""

    def wait_event(self, event: Any) -> None:
        """What is enqueued later starts once the event has passed; the host goes on."""


class Event(Protocol):
    """A point in a stream, as torch has it. One that was never recorded has passed."""

    def record(self, stream: Any = None) -> None:
        """Be the point that the stream's work has reached when all that was enqueued is done."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Return when it has passed. Raises RuntimeError as torch does, DeviceLost where it never will."""

    def wait(self, stream: Any = None) -> None:
        """As `stream.wait_event`."""


def open_device(name: str) -> Device:
    """The device that torch calls so: `npu:0`, `cuda:1`, `cpu`; without a number the current one of its kind.

    Raises DeviceUnavailable: no such device, torch without its backend, no driver.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise DeviceUnavailable(f"{name!r} is no device; write for example npu:0, cuda:0 or cpu")
    torch = _torch_with(match[1], name)
    try:
        found = torch.empty(0, device=name).device
        module: Any = torch.get_device_module(found)
        count: int = module.device_count()
    except (AssertionError, AttributeError, ImportError, RuntimeError) as error:
        raise DeviceUnavailable(
            f"torch {torch.__version__} cannot use {name}: {_first_line(error)}; see that its driver is there, and "
            "that this torch was built for it"
        ) from error
    if int(match[2] or 0) >= count:
        raise DeviceUnavailable(f"there is no {name}: torch sees {count} of them here, counted from 0")
    for wanted in ("Stream", "Event", "stream", "current_stream", "set_device"):
        if not hasattr(module, wanted):
            raise DeviceUnavailable(f"{name} cannot hold replicas: torch has no {wanted} for it; use another device")
    return Device(found, module)


class Device:
    """An accelerator as one process sees it. `cpu` is one too: its copies are done when they return."""

    def __init__(self, device: torch.device, module: Any) -> None:
        """`module`: torch's for devices of that kind, such as torch.cuda."""
        self.name = str(device)
        self.type = device.type
        self.index: int = device.index or 0
        self._device = device
        self._module = module
        self._selected = getattr(module, "device", nullcontext)
        self._registrations = list[Registration]()
        self._event_kind = _events_of(self, module.Event)
        self._probe: Stream | None = None
        self._stalled = False

    def use(self) -> None:
        """Make it the current device of the calling thread; that of a new thread is number 0."""
        self._module.set_device(self.index)

    def capacity_bytes(self) -> int:
        """All memory of the device. Raises DeviceLost."""
        return self._memory()[1]

    def free_bytes(self) -> int:
        """Memory that no process has; what torch keeps for later use counts as taken. Raises DeviceLost."""
        return self._memory()[0]

    def stream(self) -> Stream:
        """A new stream beside the current one; on cpu an inert one. Raises DeviceLost, CopyFailed."""
        try:
            return self._new_stream()
        except RuntimeError as error:
            raise self.explain(error, f"a new stream on {self.name}") from error

    def current_stream(self) -> Stream:
        """The stream that torch computes in, in this thread."""
        current: Stream = self._module.current_stream(self.index)
        return current

    def event(self) -> Event:
        """A new event; it is on the device from when it is first recorded."""
        made: Event = self._event_kind()
        return made

    def empty(self, nbytes: int) -> torch.Tensor:
        """Device memory with any content: uint8 [nbytes], aligned to ALIGN. Work that is enqueued in the current stream
        may still use it under its former owner.

        Raises DeviceFull, DeviceLost.
        """
        import torch

        self._check_going()
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            try:
                memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
                if memory.data_ptr() % ALIGN:
                    memory = torch.empty(nbytes + ALIGN - 1, dtype=torch.uint8, device=self._device)
            except RuntimeError as error:
                raise self._full(error, nbytes, f"memory of {self.name}") from error
            skew = -memory.data_ptr() % ALIGN
            return memory[skew : skew + nbytes]

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device reads by itself, with any content: uint8 [nbytes]; on cpu, ordinary memory.

        Give it back with `unpin`. Raises DeviceFull where the host has no more to pin, DeviceLost.
        """
        import torch

        self._check_going()
        with torch.inference_mode(False):
            try:
                memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.type != "cpu")
                if nbytes and not memory.data_ptr():  # how torch_npu says no; it would say so again out of its cache
                    del memory
                    self._release_pinned()
                    raise RuntimeError("torch gave a null pointer")
            except RuntimeError as error:
                raise self._full(error, nbytes, f"host memory pinned for {self.name}") from error
        return memory

    def unpin(self, held: list[torch.Tensor], streams: Iterable[Stream] = (), stopped: bool = False) -> None:
        """Give back what `pinned` gave, and empty `held`, the last references. Copies from it, in `streams`, are done.

        It stays pinned until the process ends where the device is lost, or `stopped`: where a stream that copied from
        it has failed. To free memory torch marks the end of its use in those streams, and a mark that fails there ends
        the process.
        """
        with suppress(RuntimeError):
            self.free_bytes()
            if not stopped:
                held.clear()
                for stream in streams:
                    mark = self.event()
                    mark.record(stream)
                    mark.synchronize()
                self._release_pinned()
        for memory in held:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        held.clear()

    def register(self, buffer: memoryview) -> Registration | None:
        """Have the device read this host memory by itself until the registration is closed; None where its runtime
        cannot: copies then go through staging. It pins the pages: tell their pool (`Model.mark_pinned`)."""
        if not buffer.nbytes or not hasattr(self._module, "cudart"):
            return None
        runtime = self._module.cudart()
        address = address_of(buffer)
        flags = _REGISTER_READ_ONLY if buffer.readonly else 0
        with self._selected(self.index):
            if int(runtime.cudaHostRegister(address, buffer.nbytes, flags)):
                # The runtime keeps the refusal as this thread's last error; torch would take it for its next kernel's.
                with suppress(RuntimeError):
                    self.empty(1).fill_(0)
                return None
        made = Registration(self, runtime, buffer)
        self._registrations.append(made)
        return made

    def registered(self, source: memoryview) -> torch.Tensor | None:
        """The bytes of `source` as a host tensor that the device reads by itself, where they are registered."""
        address = address_of(source)
        for held in tuple(self._registrations):
            start = address - held.address
            if start >= 0 and start + source.nbytes <= held.nbytes:
                return held.memory[start : start + source.nbytes]
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Enqueue a copy between tensors of equal size; the host goes on, where the device reads `source` by itself.
        Raises RuntimeError, as torch does."""
        self._check_going()
        with self._module.stream(stream):
            target.copy_(source, non_blocking=True)

    def release_cached(self) -> None:
        """Let other processes have what torch keeps for later use. The runtime may wait for the whole device. Raises
        DeviceLost, CopyFailed."""
        if hasattr(self._module, "empty_cache"):
            self._check_going()
            try:
                self._module.empty_cache()
            except RuntimeError as error:
                raise self.explain(error, f"giving memory of {self.name} back") from error

    def explain(self, error: Exception, doing: str) -> TiermemError:
        """What an error of torch means, to be raised: DeviceLost where the device answers no more, or torch gives it
        nothing more to do, else CopyFailed."""
        if isinstance(error, TiermemError):
            return error
        try:
            self._check_answers()
        except DeviceLost as lost:
            lost.__cause__ = lost.__cause__ or error
            return lost
        failure = CopyFailed(f"{doing} failed: {_first_line(error)}; the device still answers, so try it again")
        failure.__cause__ = error
        return failure

    def _new_stream(self) -> Stream:
        with self._selected(self.index):
            made: Stream = self._module.Stream()
        return made

    def _await(self, event: Event) -> None:
        """Return when an event has passed; torch_npu would wait for ever where its queue has dropped the recording."""
        pause_s, stalled_s = 2e-5, time.monotonic() + _STALL_S
        while not event.query():
            if time.monotonic() > stalled_s:
                self._check_answers()
                self._module.Event.synchronize(event)  # what was enqueued before the answer was is on the device
                return
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1e-3)

    def _check_answers(self) -> None:
        """Raises DeviceLost where the device says nothing, or does nothing of what it is given."""
        try:
            self._memory()
        except DeviceLost:
            self._stalled = True  # it may be the error that torch tells once
            raise
        if self._probe is None:
            with suppress(RuntimeError):
                self._probe = self._new_stream()
        if self._probe is None:
            return
        mark: Event = self._module.Event()
        try:
            mark.record(self._probe)
            late_s = time.monotonic() + _ANSWER_S
            while not mark.query():
                self._stalled = time.monotonic() > late_s
                self._check_going()
                time.sleep(1e-3)
        except DeviceLost:
            raise
        except RuntimeError as error:
            self._stalled = True
            raise self._lost(f"does nothing more: {_first_line(error)}") from error

    def _check_going(self) -> None:
        if self._stalled:
            raise self._lost("does nothing more that it is given, after an error that torch told once")

    def _lost(self, why: str) -> DeviceLost:
        return DeviceLost(f"{self.name} {why}; its replicas are gone. Start this process again once the device is back")

    def _release_pinned(self) -> None:
        """Let the host have what torch keeps pinned for later use."""
        import torch

        accelerator: Any = getattr(torch, "accelerator", None)
        if hasattr(accelerator, "empty_host_cache") and accelerator.is_available():
            accelerator.empty_host_cache()

    def _memory(self) -> tuple[int, int]:
        """Free bytes and all bytes."""
        self._check_going()
        if self.type == "cpu":
            memory = host.memory()
            return min(memory.available_bytes, memory.usable_bytes), memory.usable_bytes
        try:
            free, total = self._module.mem_get_info(self.index)
        except RuntimeError as error:
            raise self._lost(f"answers no more: {_first_line(error)}") from error
        return int(free), int(total)

    def _full(self, error: RuntimeError, nbytes: int, what: str) -> DeviceFull:
        """Nothing but want of memory stops an allocation on a device that answers. Raises DeviceLost."""
        free = self.free_bytes()
        return DeviceFull(
            f"{format_bytes(nbytes)} of {what} cannot be had, {self.name} has {format_bytes(free)} free: "
            f"{_first_line(error)}; lower the budget, or end what else uses it",
            nbytes - free if nbytes > free else nbytes,
        )

    def _forget(self, registration: Registration) -> None:
        self._registrations.remove(registration)

    def __repr__(self) -> str:
        return f"<Device {self.name}>"


class Registration:
    """Host memory that a device reads by itself: `memory` is uint8 [nbytes] over it, and only to be read."""

    def __init__(self, device: Device, runtime: Any, buffer: memoryview) -> None:
        import torch

        self.address, self.nbytes = address_of(buffer), buffer.nbytes
        # torch takes no read-only memory without a warning.
        seen = (ctypes.c_ubyte * self.nbytes).from_address(self.address)
        self.memory = torch.frombuffer(seen, dtype=torch.uint8)
        self._buffer: memoryview | None = buffer
        self._device, self._runtime = device, runtime

    def close(self) -> None:
        """End it. No copy from this memory may be on its way."""
        if self._buffer is not None:
            self._device._forget(self)
            self._buffer = None
            self._runtime.cudaHostUnregister(self.address)


def address_of(buffer: memoryview) -> int:
    """Where contiguous memory starts; of no bytes, anywhere."""
    return int(np.frombuffer(buffer, np.uint8).ctypes.data) if buffer.nbytes else 0


def _events_of(device: Device, kind: Any) -> Any:
    """torch's events of a kind, of which those that will never pass say so."""

    def query(event: Any) -> bool:
        device._check_going()
        return bool(kind.query(event))

    return type(kind.__name__, (kind,), {"query": query, "synchronize": lambda event: device._await(event)})


def _torch_with(kind: str, name: str) -> Any:
    """torch, and with it the package `torch_<kind>` where devices of that kind come from there (torch_npu)."""
    try:
        import torch
    except (ImportError, RuntimeError) as error:  # RuntimeError: a backend that torch loads by itself does not load
        raise DeviceUnavailable(
            f"{name} needs torch, which does not import: {_first_line(error)}; install tiermem[torch], and where a "
            "backend does not load, its driver's libraries"
        ) from error
    try:
        torch.device(kind)
        return torch
    except RuntimeError:
        package = f"torch_{kind}"
    try:
        importlib.import_module(package)
        torch.device(kind)
    except (ImportError, RuntimeError) as error:
        raise DeviceUnavailable(
            f"torch {torch.__version__} has no {kind}, and {package}, which would bring it, does not import: "
            f"{_first_line(error)}; install it, and its driver's libraries"
        ) from error
    return torch


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
