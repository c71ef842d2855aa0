"""A device: what it says, what its errors mean, and what opening a wrong one answers. Here is also the slow device that
the tests of its users take: its streams are threads, and a test holds them up or has them fail."""

from __future__ import annotations

import ctypes
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tiermem.device import ALIGN, Device, open_device
from tiermem.errors import BY_CODE, CopyFailed, DeviceFull, DeviceLost, DeviceUnavailable

TOO_MUCH = 1 << 50
"""Bytes that no host has."""


class Line:
    """A stream: a thread that does what is enqueued, in order, while `gate` is open. `log`: what was enqueued."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.log: list[str] = []
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def enqueue(self, what: str, work: Callable[[], object]) -> None:
        self.log.append(what)
        self._work.put(work)

    def wait_event(self, event: Mark) -> None:
        self.enqueue("wait_event", event.point.wait)

    def close(self) -> None:
        self.gate.set()
        self._work.put(None)
        self._thread.join(10)
        assert not self._thread.is_alive(), "a stream waits for what does not come"

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self.gate.wait()
            work()


class Mark:
    """An event; `fault` is what asking for it raises. Recording it again is another point of time, as it is in CUDA."""

    def __init__(self) -> None:
        self.point = threading.Event()
        self.point.set()
        self.fault: Exception | None = None

    def record(self, stream: Line) -> None:
        self.point = threading.Event()
        stream.enqueue("record", self.point.set)

    def query(self) -> bool:
        self._ask()
        return self.point.is_set()

    def synchronize(self) -> None:
        self._ask()
        self.point.wait()
        self._ask()

    def wait(self, stream: Line) -> None:
        stream.wait_event(self)

    def _ask(self) -> None:
        if self.fault is not None:
            raise self.fault


class SlowModule:
    """Stands for torch.npu. `calls`: of all that concerns the whole device."""

    Event = Mark

    def __init__(self) -> None:
        self.compute = Line()
        self.lines = [self.compute]
        self.calls: list[str] = []
        self.lost = False
        self._current = threading.local()

    def Stream(self) -> Line:
        self.lines.append(Line())
        return self.lines[-1]

    @contextmanager
    def stream(self, line: Line) -> Iterator[None]:
        self._current.line = line
        yield
        self._current.line = self.compute

    def current_stream(self, index: int) -> Line:
        return getattr(self._current, "line", self.compute)

    def set_device(self, index: int) -> None:
        self.calls.append(f"set_device {index}")

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.lost:
            raise RuntimeError("the simulated device is lost")
        return 3 << 30, 4 << 30


class SlowDevice(Device):
    """Memory of the host whose copies are done later, by the stream's thread. `faults`: what the n-th copy raises."""

    def __init__(self) -> None:
        self.module = SlowModule()
        super().__init__(torch.device("cpu"), self.module)
        self.name, self.type = "slow:0", "slow"
        self.copies = 0
        self.faults: dict[int, Exception] = {}

    def pinned(self, nbytes: int) -> torch.Tensor:
        return self.empty(nbytes)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        self.copies += 1
        if self.copies - 1 in self.faults:
            raise self.faults[self.copies - 1]
        # By address, as hardware does: what it uses is not kept alive by that.
        place, taken, nbytes = target.data_ptr(), source.data_ptr(), target.numel()
        stream.enqueue("copy", lambda: ctypes.memmove(place, taken, nbytes))

    def close(self) -> None:
        for line in self.module.lines:
            line.gate.set()
        for line in self.module.lines:
            line.close()


@contextmanager
def slow_device() -> Iterator[SlowDevice]:
    device = SlowDevice()
    try:
        yield device
    finally:
        device.close()


def refuse(monkeypatch: pytest.MonkeyPatch, above_bytes: int = 0) -> None:
    """Have torch be out of memory for more than so many bytes."""
    genuine = torch.empty

    def empty(nbytes: int, **options: Any) -> torch.Tensor:
        if nbytes > above_bytes:
            raise torch.OutOfMemoryError(f"out of memory: tried to allocate {nbytes}\nand a second line")
        return genuine(nbytes, **options)

    monkeypatch.setattr(torch, "empty", empty)


def test_cpu_is_a_device() -> None:
    device = open_device("cpu")
    assert (device.name, device.type, device.index) == ("cpu", "cpu", 0)
    assert 0 < device.free_bytes() <= device.capacity_bytes()
    device.use()
    stream, event = device.stream(), device.event()
    event.record(stream)
    event.wait(device.current_stream())
    assert event.query()
    target, source = device.empty(100), device.pinned(100)
    source.fill_(7)
    device.copy(target, source, stream)
    assert target.eq(7).all()


@pytest.mark.parametrize("nbytes", [0, 1, 511, 512, 4096, 1 << 20, (8 << 20) + 3])
def test_memory_is_aligned_and_of_its_size(nbytes: int) -> None:
    memory = open_device("cpu").empty(nbytes)
    assert memory.dtype == torch.uint8
    assert memory.shape == (nbytes,)
    assert memory.data_ptr() % ALIGN == 0


def test_memory_that_was_made_in_inference_can_be_written_to_outside() -> None:
    device = open_device("cpu")
    with torch.inference_mode():
        memory, pinned = device.empty(4), device.pinned(4)
    memory.copy_(pinned.fill_(1))
    assert memory.eq(1).all()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "write for example"),
        ("cpu:", "write for example"),
        ("CUDA:0", "write for example"),
        ("cuda:-1", "write for example"),
        ("cpu:7", "torch sees 1"),
        ("hpu", "cannot use hpu"),
        ("meta", "cannot use meta"),
        ("toaster:0", "torch_toaster, which would bring it, does not import: No module"),
    ],
)
def test_what_is_no_device(name: str, says: str) -> None:
    with pytest.raises(DeviceUnavailable, match=says):
        open_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use CUDA here")
def test_torch_without_the_backend_or_without_a_driver() -> None:
    with pytest.raises(DeviceUnavailable, match=r"cannot use cuda:0: .+driver"):
        open_device("cuda:0")


def test_a_device_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "Stream")
    with pytest.raises(DeviceUnavailable, match="torch has no Stream for it"):
        open_device("cpu")


def test_the_package_of_a_kind_is_imported_and_its_failure_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torch_toy.py").write_text("raise ImportError('libtoy.so: cannot open shared object file')")
    with pytest.raises(DeviceUnavailable, match=r"torch_toy, .*: libtoy\.so: cannot open"):
        open_device("toy:0")
    (tmp_path / "torch_idle.py").write_text("")
    with pytest.raises(DeviceUnavailable, match="has no idle"):
        open_device("idle:0")
    assert sys.modules.pop("torch_idle")


@pytest.mark.parametrize("fault", [ImportError("no torch"), RuntimeError("Failed to load the backend extension")])
def test_torch_that_does_not_import(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torch":
                raise fault

    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "meta_path", [Finder()])
    with pytest.raises(DeviceUnavailable, match=f"does not import: {fault}"):
        open_device("npu:0")


def test_too_much_memory_is_lacking() -> None:
    device = open_device("cpu")
    for allocate in (device.empty, device.pinned):
        with pytest.raises(DeviceFull, match=r"1024\.0 TiB of .* cpu has .* free: .*allocate") as caught:
            allocate(TOO_MUCH)
        assert TOO_MUCH // 2 < caught.value.lacking_bytes < TOO_MUCH
        assert isinstance(caught.value, MemoryError)


def test_too_much_in_one_piece_lacks_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with slow_device() as device:
        refuse(monkeypatch)
        with pytest.raises(
            DeviceFull, match=r"slow:0 has 3\.0 GiB free: out of memory: tried to allocate 1024;"
        ) as caught:
            device.empty(1024)
        assert caught.value.lacking_bytes == 1024
        device.module.lost = True
        with pytest.raises(DeviceLost, match="answers no more: the simulated device is lost"):
            device.empty(1024)


def test_what_an_error_means() -> None:
    with slow_device() as device:
        fault = RuntimeError("ECC\nstack")
        meant = device.explain(fault, "copy of 1 B to slow:0")
        assert isinstance(meant, CopyFailed)
        assert str(meant).startswith("copy of 1 B to slow:0 failed: ECC;")
        assert meant.__cause__ is fault
        assert device.explain(meant, "again") is meant
        device.module.lost = True
        assert isinstance(device.explain(fault, "copy"), DeviceLost)
        for ask in (device.free_bytes, device.capacity_bytes):
            with pytest.raises(DeviceLost):
                ask()


def test_an_error_keeps_what_is_lacking_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DeviceFull("too much", 42)))
    assert (str(error), error.lacking_bytes) == ("too much", 42)
    for code in ("device-full", "device-lost", "device-unavailable", "copy"):
        assert str(BY_CODE[code]("said")) == "said"


class Runtime:
    """Stands for CUDA's: `answer` is that of the next registration."""

    def __init__(self) -> None:
        self.answer = 0
        self.held: dict[int, tuple[int, int]] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if not self.answer:
            self.held[address] = nbytes, flags
        return self.answer

    def cudaHostUnregister(self, address: int) -> None:
        del self.held[address]


def test_registered_memory_is_found_and_given_back() -> None:
    with slow_device() as device:
        runtime = Runtime()
        vars(device.module)["cudart"] = lambda: runtime
        bytes_ = bytes(range(100))
        read_only, writable = memoryview(bytes_), memoryview(bytearray(50))
        first, second = device.register(read_only), device.register(writable)
        assert first is not None
        assert second is not None
        assert [flags for _, flags in runtime.held.values()] == [8, 0]
        part = device.registered(read_only[10:20])
        assert part is not None
        assert part.tolist() == list(range(10, 20))
        around = (np.frombuffer(bytearray(200), np.uint8)[50:150]).data
        assert device.registered(around) is None
        inner = device.register(around[20:40])
        assert device.registered(around[20:41]) is None
        assert device.registered(around[19:40]) is None
        assert device.registered(around[20:40]) is not None
        for registration in (first, second, inner, first):
            assert registration is not None
            registration.close()
        assert not runtime.held
        assert device.registered(read_only) is None


def test_memory_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_device("cpu").register(memoryview(bytearray(100))) is None
    with slow_device() as device:
        runtime = Runtime()
        vars(device.module)["cudart"] = lambda: runtime
        runtime.answer = 801
        kernels: list[int] = []

        def kernel(number: int) -> None:
            kernels.append(number)
            raise RuntimeError("operation not supported, says an earlier call")

        monkeypatch.setattr(device, "empty", lambda nbytes: SimpleNamespace(fill_=kernel))
        assert device.register(memoryview(bytes(100))) is None
        assert kernels == [0], "the refusal would be the error of somebody's next kernel"
        assert device.register(memoryview(b"")) is None


def test_a_stream_is_made_on_its_own_device() -> None:
    with slow_device() as device:
        chosen: list[int] = []
        vars(device.module)["device"] = lambda index: chosen.append(index) or nullcontext()
        second = Device(torch.device("cuda:1"), device.module)
        second.stream()
        second.use()
        assert chosen == [1]
        assert device.module.calls == ["set_device 1"]

        def broken() -> Line:
            raise RuntimeError("no more streams")

        vars(device.module)["Stream"] = broken
        with pytest.raises(CopyFailed, match="a new stream on cuda:1 failed: no more streams"):
            second.stream()
