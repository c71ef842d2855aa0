"""Capture: one recording while it is made. Writes what the pool tells, and what one process's events tell beside it.

Owns the file, the stream from the pool and the rings of the process. Never starts a process and never prints.
"""

from __future__ import annotations

import errno
import io
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from tiermem import _native, host
from tiermem.addresses import AddressBook
from tiermem.client import Client
from tiermem.errors import NativeError
from tiermem.observations import Rung
from tiermem.recording import Recorder, frame, samples_frames
from tiermem.recording.frames import VERSION, read_frames
from tiermem.rpc import messages as m
from tiermem.sampler import ladder
from tiermem.sampler.events import Parts, faults
from tiermem.sampler.perf import Batch, PerfSampler
from tiermem.sampler.records import Comm, Exit, Fork, Mmap, Sideband
from tiermem.samples import SAMPLE, Samples
from tiermem.types import PAGE_BYTES

_TICK_S = 0.1
_SETTLED_S = 1.0
"""Samples wait so long: by then the pool has told where the process that they are from has mapped its models."""

_RINGS_BYTES = (1 << 20, 64 << 10)
"""A process that starts takes hundreds of thousands of page faults a second; without rights little may be locked."""


@dataclass(slots=True)
class Figures:
    """What was written so far, and what was not. `foreign`: samples of addresses in no model."""

    windows: int = 0
    samples: int = 0
    foreign: int = 0
    lost: int = 0
    dropped: int = 0
    throttled: int = 0


class Capture:
    """Records into `path` from now until `close`. Raises OSError for a file that cannot be written."""

    def __init__(
        self,
        path: str | Path,
        client: Client,
        command: Sequence[str] | None = None,
        *,
        epoch_s: float | None = None,
        budget: float | None = None,
    ) -> None:
        self.figures = Figures()
        self.pool_ended = threading.Event()
        self.failure = ""
        self._book = AddressBook()
        self._address: dict[str, int] = {}
        self._waiting: list[tuple[float, bytes, Samples]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._sampling: threading.Thread | None = None
        header = _header(client, command)
        try:
            self._recorder = Recorder(path)
            self._recorder.append(header)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        try:
            self._stream = client.watch(epoch_s, budget)
        except BaseException:
            self._recorder.close()
            raise
        self._stream.follow(self._take, self.pool_ended.set)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self._recorder.nbytes

    def sample(self, pid: int) -> str:
        """Also take samples of a process and of what it starts, by the best event there is; returns the event's name.

        Raises NativeError where the process is gone or another user's.
        """
        sampler, events, rung = _open_sampler(pid)
        try:
            self._append(_process_frames(pid))
        except BaseException:
            sampler.close()
            raise
        self._sampling = threading.Thread(target=self._run, args=(sampler, events, rung), name="tiermem-capture")
        self._sampling.start()
        return ", ".join(event.name for event in events)

    def close(self, reason: str) -> None:
        """End the recording; `reason` is written into it."""
        self._stopping.set()
        if self._sampling is not None:
            self._sampling.join()
        time.sleep(_TICK_S)  # what clients saw until now is on its way
        self._stream.cancel()
        self.pool_ended.wait(1.0)
        self._write_samples(float("inf"))
        self._append(frame("end", time.monotonic(), reason=reason))
        self._recorder.close()

    def _take(self, event: m.WatchEvent) -> None:
        self._append(event.frames)
        self.figures.dropped += event.dropped
        for _, fields in read_frames(io.BytesIO(event.frames), len(event.frames), []):
            self._note(fields)

    def _note(self, fields: Mapping[str, Any]) -> None:
        match fields["kind"]:
            case "bits":
                self.figures.windows += 1
            case "map":
                self._address[fields["lease"]] = fields["address"]
                with self._lock:
                    nbytes = fields["pages"] * PAGE_BYTES
                    self._book.map(fields["pid"], 0, fields["address"], nbytes, int(fields["time_s"] * 1e9))
            case "unmap" if fields["lease"] in self._address:
                with self._lock:
                    self._book.unmap(fields["pid"], self._address.pop(fields["lease"]), int(fields["time_s"] * 1e9))

    def _run(self, sampler: PerfSampler, events: Parts, rung: Rung) -> None:
        with sampler:
            while not self._stopping.is_set():
                self._poll(sampler, _TICK_S, events, rung)
            self._poll(sampler, 0.0, events, rung)

    def _poll(self, sampler: PerfSampler, timeout_s: float, events: Parts, rung: Rung) -> None:
        batch = sampler.poll(timeout_s)
        now = time.monotonic()
        names, periods = [event.name for event in events], [event.event.period for event in events]
        head = frame("events", now, names=names, periods=periods, rung=rung.name.lower())
        self._append(b"".join(_sideband_frame(record) for record in batch.sideband))
        self._waiting.append((now, head, batch.samples))
        self._count(batch)
        self._write_samples(now - _SETTLED_S)

    def _count(self, batch: Batch) -> None:
        self.figures.lost += batch.lost + batch.lost_samples
        self.figures.throttled += batch.throttled

    def _write_samples(self, until_s: float) -> None:
        while self._waiting and self._waiting[0][0] <= until_s:
            taken_s, head, samples = self._waiting.pop(0)
            with self._lock:
                ours = self._book.resolve(samples).model >= 0
            kept = samples[ours] if len(samples) else np.empty(0, SAMPLE)
            self.figures.samples += len(kept)
            self.figures.foreign += len(samples) - len(kept)
            if len(kept):
                self._append(head + samples_frames(taken_s, kept))

    def _append(self, frames: bytes) -> None:
        """A full disk ends the recording, not the process that is recorded; the file stays readable."""
        try:
            if frames and not self.failure:
                self._recorder.append(frames)
        except OSError as error:
            self.failure = error.strerror or str(error)
            self.pool_ended.set()


def _open_sampler(pid: int) -> tuple[PerfSampler, Parts, Rung]:
    """Hardware events where the host has them, otherwise page faults: first touches after each zap. In rings as large
    as the user may lock, with the kernel's own accesses where the user may see them."""
    found = [state.events for state in ladder() if state.rung is Rung.PERF and state.available and not state.whole_host]
    events = [(found[0], Rung.PERF)] if found else [(faults(kernel=kernel), Rung.PRESENT) for kernel in (True, False)]
    for (parts, rung), ring_bytes in product(events, _RINGS_BYTES):
        try:
            return PerfSampler(parts, [pid], sideband=True, ring_bytes=ring_bytes), parts, rung
        except NativeError as error:
            problem = error
            if error.errno not in (errno.EACCES, errno.EPERM):
                break
    raise problem


def _header(client: Client, command: Sequence[str] | None) -> bytes:
    status = client.status()
    config = {**status["pool"], "policy": status["migration"]["policy"], "tiers": status["tiers"]}
    facts = asdict(host.probe())
    return frame(
        "header", time.monotonic(), version=VERSION, tiermem=_native.version(), host=facts, config=config,
        command=list(command) if command else None, unix_s=time.time(),
    )  # fmt: skip


def _process_frames(pid: int) -> bytes:
    """The process and its threads as they are now, and the programs and libraries that it has mapped."""
    now = time.monotonic()
    root = Path(f"/proc/{pid}")
    try:
        start_ticks = int((root / "stat").read_text(errors="surrogateescape").rpartition(")")[2].split()[19])
        comm = (root / "comm").read_text(errors="surrogateescape").rstrip("\n")
        frames = [frame("process", now, pid=pid, start_ticks=start_ticks, comm=comm)]
        for task in (root / "task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # threads come and go
                name = (task / "comm").read_text(errors="surrogateescape").rstrip("\n")
                frames.append(frame("thread", now, pid=pid, tid=int(task.name), comm=name))
        for line in (root / "maps").read_text(errors="surrogateescape").splitlines():
            span, rights, offset, _, _, *path = line.split(None, 5)
            if "x" in rights and path and path[0].startswith("/"):
                begin, end = (int(part, 16) for part in span.split("-"))
                frames.append(frame("image", now, pid=pid, address=begin, nbytes=end - begin, offset=int(offset, 16),
                                    path=path[0]))  # fmt: skip
    except OSError as error:
        raise NativeError(
            f"process {pid}: {error.strerror}; it ended, or is another user's", error.errno or 0
        ) from None
    return b"".join(frames)


def _sideband_frame(record: Sideband) -> bytes:
    time_s = record.time / 1e9
    match record:
        case Mmap() if record.path.startswith("/"):
            return frame("image", time_s, pid=record.pid, address=record.addr, nbytes=record.length,
                         offset=record.offset, path=record.path)  # fmt: skip
        case Comm():
            return frame("thread", time_s, pid=record.pid, tid=record.tid, comm=record.name)
        case Exit() if record.pid == record.tid:
            return frame("exit", time_s, pid=record.pid)
        case Fork() | Exit() | Mmap():
            return b""
