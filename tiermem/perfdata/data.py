"""PerfData: what a perf.data file holds, once it is read. Frozen; never touches the file."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tiermem.perfdata.events import EventInfo
from tiermem.samples import Samples


class Image(NamedTuple):
    """Bytes [offset, offset + nbytes) of file `path` were mapped at `address` by process `pid`, -1 for the kernel."""

    pid: int
    time: int
    address: int
    nbytes: int
    offset: int
    path: str
    executable: bool


class Fork(NamedTuple):
    """Thread (pid, tid) was started by thread (parent_pid, parent_tid); a process where the pids differ."""

    pid: int
    tid: int
    parent_pid: int
    parent_tid: int
    time: int


class Exit(NamedTuple):
    pid: int
    tid: int
    time: int


@dataclass(frozen=True, slots=True)
class PerfData:
    """A perf.data file. Times are in ns of the recording's clock; what the file does not tell is 0 or empty.

    `samples`: dtype SAMPLE, in time order over all rings, in file order where times are equal or missing; `event` is
    an index of `events`. `images`, `forks` and `exits` are in time order. `names` maps (pid, tid) to what that thread
    was called from when on, ascending. `lost` counts records, `lost_samples` samples that found no room. `notes` say
    what was skipped, is missing or could not be told.
    """

    path: str
    events: tuple[EventInfo, ...]
    samples: Samples
    names: Mapping[tuple[int, int], tuple[tuple[int, str], ...]]
    images: tuple[Image, ...]
    forks: tuple[Fork, ...]
    exits: tuple[Exit, ...]
    lost: int
    lost_samples: int
    throttled: int
    unthrottled: int
    hostname: str
    os_release: str
    perf_version: str
    arch: str
    cpus: int
    cpu: str
    cpuid: str
    memory_bytes: int
    command: tuple[str, ...]
    build_ids: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def comms(self) -> dict[tuple[int, int], str]:
        """The last name of every thread: (pid, tid) -> name."""
        return {thread: history[-1][1] for thread, history in self.names.items()}

    def comm_at(self, pid: int, tid: int, time: int) -> str:
        """What thread (pid, tid) was called at `time`; empty if nobody told."""
        history = self.names.get((pid, tid), ())
        at = bisect_right(history, time, key=lambda entry: entry[0])
        return history[at - 1][1] if at else ""
