"""Access samples: rings that the kernel fills, and decoders of their records. Chooses no event, sums up nothing."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tiermem._native.door import E_RANGE, E_SHORT, Handle, check, ffi, lib
from tiermem.errors import NativeError
from tiermem.samples import SAMPLE, Samples

RECORD = np.dtype([("offset", "<u8"), ("type", "<u4"), ("misc", "<u2"), ("size", "<u2")])
"""One record that is no sample: `offset` of its header (perf_event_header, 8 bytes) in what was decoded."""

_HEADER_BYTES = 8
_VARIABLE = sum(1 << bit for bit in (4, 5, 10, 11, 12, 13, 18, 20))
"""The fields of a sample without a fixed length: READ, CALLCHAIN, RAW and the others."""

_NO_EVENT = "this CPU or VM has no such event"
_NO_RIGHT = (
    "lower /proc/sys/kernel/perf_event_paranoid or give CAP_PERFMON; own processes need exclude_kernel and no "
    "physical addresses"
)
_IN_USE = "another user holds the PMU; end their session or ask for fewer events"
_NEXT = {
    errno.ENOENT: _NO_EVENT,
    errno.EOPNOTSUPP: _NO_EVENT,
    errno.ENODEV: _NO_EVENT,
    errno.EACCES: _NO_RIGHT,
    errno.EPERM: f"{_NO_RIGHT}; or the ring exceeds /proc/sys/kernel/perf_event_mlock_kb and RLIMIT_MEMLOCK",
    errno.EBUSY: _IN_USE,
    errno.ENOSPC: _IN_USE,
    errno.ENODATA: "on this CPU it must follow mem-loads-aux in a group; open that one first, as the leader",
    errno.E2BIG: "this kernel knows no config3",
    errno.ESRCH: "the process has ended",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EINVAL: "the event's fields do not go together, inherit lacks a cpu, or the size is no power of two",
}


@dataclass(frozen=True, slots=True)
class Event:
    """What to sample, in the terms of perf_event_open(2).

    `period`: one sample each so many occurrences. `sideband`: records of executable mappings, threads, exec and exits
    too. `inherit`: threads and processes that start later too; needs a cpu. `on_exec`: enabled by the next exec.
    `monotonic`: times are CLOCK_MONOTONIC. A breakpoint has its address in `config1`, its length in `config2`.
    """

    type: int
    config: int
    _: KW_ONLY
    config1: int = 0
    config2: int = 0
    config3: int = 0
    period: int = 1
    sample_type: int
    precise: int = 0
    breakpoint_type: int = 0
    exclude_kernel: bool = True
    inherit: bool = False
    sideband: bool = False
    on_exec: bool = False
    monotonic: bool = False
    disabled: bool = False

    def __str__(self) -> str:
        return f"event {self.config:#x} of type {self.type}"

    def flags(self) -> int:
        chosen = (
            (self.exclude_kernel, lib.TM_EVENT_EXCLUDE_KERNEL), (self.inherit, lib.TM_EVENT_INHERIT),
            (self.sideband, lib.TM_EVENT_SIDEBAND), (self.on_exec, lib.TM_EVENT_ON_EXEC),
            (self.monotonic, lib.TM_EVENT_MONOTONIC), (self.disabled, lib.TM_EVENT_DISABLED),
        )  # fmt: skip
        return sum(flag for wanted, flag in chosen if wanted)


class Count(NamedTuple):
    """An event's id in its records, what it counted so far, and the records that found no room in the ring."""

    id: int
    value: int
    lost: int


class Ring(Handle):
    """One event and the buffer that the kernel fills with its records. One thread reads it at a time."""

    noun = "ring"

    def __init__(
        self,
        event: Event,
        pid: int,
        cpu: int,
        *,
        leader: Ring | None = None,
        nbytes: int = 1 << 20,
        aux_nbytes: int = 0,
    ) -> None:
        """Samples thread `pid` (0: the caller's, -1: all) on `cpu` (-1: any), at once unless `disabled` or `on_exec`.

        `nbytes`, `aux_nbytes`: powers of two. Raises NativeError, which says what the event lacks.
        """
        wanted = ffi.new("tm_event *", [
            event.type, event.flags(), event.config, event.config1, event.config2, event.config3, event.period,
            event.sample_type, event.precise, event.breakpoint_type,
        ])  # fmt: skip
        made = ffi.new("tm_ring **")
        group = ffi.NULL if leader is None else leader.live()
        status = lib.tm_ring_open(wanted, pid, cpu, group, nbytes, aux_nbytes, made)
        if status < 0:
            text = ffi.string(lib.tm_status_text(status)).decode()
            advice = f"; {_NEXT[-status]}" if -status in _NEXT else ""
            raise NativeError(f"cannot sample {event} for pid {pid} on cpu {cpu}: {text}{advice}", -status)
        super().__init__(made[0], lib.tm_ring_close, f"of {event}")
        self.event = event

    @property
    def fd(self) -> int:
        """For epoll: readable when a quarter is full."""
        return int(lib.tm_ring_fd(self.live()))

    def enable(self) -> None:
        check(lib.tm_ring_enable(self.live()), f"cannot enable {self._name}")

    def disable(self) -> None:
        check(lib.tm_ring_disable(self.live()), f"cannot disable {self._name}")

    def count(self) -> Count:
        """The event's id, count and losses; hands over the samples that the hardware still buffers."""
        made = ffi.new("uint64_t[3]")
        check(lib.tm_ring_count(self.live(), made, made + 1, made + 2), f"cannot count {self._name}")
        return Count(*made)

    def read(self, buffer: Any) -> int:
        """Move whole records to writable `buffer`, oldest first; how many bytes, 0 where there is none.

        Raises NativeError: E_SHORT where the next record is longer than the buffer (64 KiB hold any), E_RANGE where the
        ring was damaged, and was emptied.
        """
        return self._read(lib.tm_ring_read, buffer)

    def read_aux(self, buffer: Any) -> int:
        """Move bytes of the AUX area to writable `buffer`; how many. Raises NativeError."""
        return self._read(lib.tm_ring_read_aux, buffer)

    def _read(self, call: Any, buffer: Any) -> int:
        handle, got = self.live(), ffi.new("uint64_t *")
        with ffi.from_buffer(buffer, require_writable=True) as memory:
            status = call(handle, memory, len(memory), got)
        if status == -E_SHORT:
            raise NativeError(f"a record is longer than the buffer of {len(memory)} bytes; 65536 hold any", E_SHORT)
        if status == -E_RANGE:
            raise NativeError(f"the ring of {self.event} held no sound record and was emptied; read on", E_RANGE)
        check(status, f"cannot read the ring of {self.event}")
        return int(got[0])


@dataclass(frozen=True, slots=True)
class Layout:
    """The fields of perf_event_attr that tell where a sample's columns are."""

    sample_type: int
    read_format: int = 0
    branch_sample_type: int = 0
    sample_regs_user: int = 0
    sample_regs_intr: int = 0

    def least_bytes(self) -> int:
        """No sample of this layout is shorter."""
        return _HEADER_BYTES + 8 * (self.sample_type & ~_VARIABLE).bit_count() + 4 * bool(self.sample_type & _VARIABLE)


class Decoded(NamedTuple):
    """`samples` of dtype SAMPLE, `records` of dtype RECORD, both in order, and the bytes of whole records `used`."""

    samples: Samples
    records: npt.NDArray[np.void]
    used: int


class Decoder(Handle):
    """Decodes the records of events with these layouts; may be used by several threads at once.

    With several layouts, `ids` tells an event's id its layout, and samples with an unknown id come as records (type 9).
    """

    noun = "decoder"

    def __init__(self, layouts: Sequence[Layout], ids: Mapping[int, int] | None = None) -> None:
        """Raises NativeError (EINVAL) for unknown bits, and where layouts have their ids in different places."""
        fields = [[each.sample_type, each.read_format, each.branch_sample_type, each.sample_regs_user,
                   each.sample_regs_intr] for each in layouts]  # fmt: skip
        known, made = dict(ids or {}), ffi.new("tm_decoder **")
        status = lib.tm_decoder_open(
            ffi.new("tm_layout[]", fields), len(fields), ffi.new("uint64_t[]", list(known)),
            ffi.new("uint16_t[]", list(known.values())), len(known), made,
        )  # fmt: skip
        check(status, f"cannot decode samples of types {[hex(each.sample_type) for each in layouts]}")
        super().__init__(made[0], lib.tm_decoder_close, f"of {len(fields)} layouts")
        self._least_bytes = min(each.least_bytes() for each in layouts)

    def decode(self, data: Any) -> Decoded:
        """Decode all whole records of `data` (any buffer); what follows `used` is an incomplete one.

        Raises NativeError (E_RANGE) where a size or count is nonsense, saying at which offset.
        """
        handle = self.live()
        counts = ffi.new("uint64_t[3]")
        with ffi.from_buffer(data) as memory:
            nbytes, used, rows = len(memory), 0, 0
            samples = np.empty(nbytes // self._least_bytes, SAMPLE)  # no more fit; untouched memory costs nothing
            records, room, full = list[npt.NDArray[np.void]](), max(64, nbytes // 1024), True
            while full:
                more = np.empty(room, RECORD)
                status = lib.tm_decoder_decode(
                    handle, memory + used, nbytes - used, _pointer("tm_sample *", samples[rows:]), len(samples) - rows,
                    _pointer("tm_record *", more), room, counts, counts + 1, counts + 2,
                )  # fmt: skip
                full = counts[2] == room
                more = more[: counts[2]]
                more["offset"] += used
                records.append(more)
                used, rows, room = used + counts[0], rows + counts[1], 2 * room
                if status < 0:
                    raise NativeError(f"the record at byte {used} of {nbytes} has an impossible size or count", E_RANGE)
        return Decoded(samples[:rows], np.concatenate(records) if len(records) > 1 else records[0], used)


class Spe(NamedTuple):
    """Rows of dtype SAMPLE, bytes of whole records `used`, and bytes that were no packets, `bad`."""

    samples: Samples
    used: int
    bad: int


_SPE_LEAST_BYTES = 10
"""An address packet and an end: no record with a data address is shorter."""


def decode_spe(data: Any) -> Spe:
    """Decode the packets of Arm's Statistical Profiling Extension: a row per record that has a data address.

    `time` in ticks of the generic timer; `weight`, `weight2`, `weight3` total, issue and translation latency in cycles;
    `data_src` the raw source, `transaction` the events, `id` the operation type; `pid` and `tid` both the context.
    """
    counts = ffi.new("uint64_t[3]")
    with ffi.from_buffer(data) as memory:
        samples = np.empty(len(memory) // _SPE_LEAST_BYTES, SAMPLE)
        status = lib.tm_spe_decode(
            memory, len(memory), _pointer("tm_sample *", samples), len(samples), counts, counts + 1, counts + 2
        )
    check(status, f"cannot decode {len(data)} bytes")
    return Spe(samples[: counts[1]], counts[0], counts[2])


def _pointer(kind: str, array: npt.NDArray[np.void]) -> Any:
    return ffi.cast(kind, array.ctypes.data)
