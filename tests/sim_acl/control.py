"""Control of the simulated ACL in this process: faults, delays, figures and the log. The other half of control.h."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass

FOR_EVER = (1 << 64) - 1
OUT_OF_MEMORY = 207001
LOST_HEARTBEAT = 507010
DMA_FAILED = 507013
_READ_AT_ONCE = 1024


class Fault(enum.IntEnum):
    """What can fail; each kind counts its own events."""

    MALLOC = 0
    MALLOC_HOST = 1
    COPY_ISSUE = 2
    COPY = 3
    DEVICE = 4


STATUS = {
    Fault.MALLOC: OUT_OF_MEMORY,
    Fault.MALLOC_HOST: OUT_OF_MEMORY,
    Fault.COPY_ISSUE: DMA_FAILED,
    Fault.COPY: DMA_FAILED,
    Fault.DEVICE: LOST_HEARTBEAT,
}


class _Call(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 40),
        ("detail", ctypes.c_char * 40),
        ("number", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("to", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("issued", ctypes.c_uint64),
        ("begun", ctypes.c_uint64),
        ("ended", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("status", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Call:
    """One call. `to`, `source`: addresses, of copies. `issued`, `begun`, `ended`: places in the one order of all
    moments, 0 where it has not come."""

    name: str
    detail: str
    number: int
    stream: int
    bytes: int
    to: int
    source: int
    issued: int
    begun: int
    ended: int
    device: int
    status: int


class SimulatedAcl:
    """The library that `tests.sim_acl.library.load` has loaded."""

    def __init__(self, library: ctypes.CDLL) -> None:
        word = ctypes.c_uint64
        self._fail = _function(library.sim_acl_fail, None, ctypes.c_int, word, word, ctypes.c_int32)
        self._heal = _function(library.sim_acl_heal, None)
        self._set_delays = _function(library.sim_acl_set_delays, None, word, word)
        self._device_bytes = _function(library.sim_acl_device_bytes, word, ctypes.c_int32)
        self._pinned_bytes = _function(library.sim_acl_pinned_bytes, word)
        self._calls = _function(library.sim_acl_calls, word)
        self._count = _function(library.sim_acl_count, word, ctypes.c_char_p)
        self._read = _function(library.sim_acl_read, word, word, ctypes.POINTER(_Call), word)

    def fail(self, fault: Fault, first: int = 1, count: int = 1, status: int | None = None) -> None:
        """Of the events of that kind from now on, `count` fail, beginning with the one of number `first`."""
        self._fail(fault, first, count, STATUS[fault] if status is None else status)

    def lose_device(self, first: int = 1) -> None:
        """Every call that reaches the device fails from the one of number `first` on, and what is queued there."""
        self.fail(Fault.DEVICE, first, FOR_EVER)

    def heal(self) -> None:
        """Ends all faults; streams that one has stopped run again."""
        self._heal()

    def set_delays(self, copy_us_per_mib: int = 0, kernel_us: int = 0) -> None:
        """How long copies and kernels take from now on."""
        self._set_delays(copy_us_per_mib, kernel_us)

    def device_bytes(self, device: int = 0) -> int:
        """What this process has allocated on a device."""
        return int(self._device_bytes(device))

    def pinned_bytes(self) -> int:
        """Host memory that is allocated or registered for the device."""
        return int(self._pinned_bytes())

    def position(self) -> int:
        """The number of the last call, for `calls`."""
        return int(self._calls())

    def count(self, name: str) -> int:
        """How often a function was called since the process began."""
        return int(self._count(name.encode()))

    def calls(self, after: int = 0, *names: str) -> list[Call]:
        """The calls of numbers above `after`, of `names` alone if any are given, oldest first. 65536 are kept."""
        found: list[Call] = []
        room = (_Call * _READ_AT_ONCE)()
        while read := self._read(after, room, _READ_AT_ONCE):
            found.extend(map(_call, room[:read]))
            after = room[read - 1].number
        return [call for call in found if not names or call.name in names]


def _call(raw: _Call) -> Call:
    fields = {name: getattr(raw, name) for name, _ in _Call._fields_}
    return Call(**{name: value.decode() if isinstance(value, bytes) else value for name, value in fields.items()})


def _function(function: Callable[..., int], result: type | None, *arguments: type) -> Callable[..., int]:
    function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    return function
