"""One load in progress: which bytes are still to come, in which order, who waits for them, and how it ended.

Owns the queue of reads and the waiting futures. Never starts threads (the loader does) and never allocates memory
(the pool does). A tensor becomes readable when its bytes have the digest that is on record or, where none is, when
its files still are what they were before the read.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby

from blake3 import blake3

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.errors import CapacityError, DigestMismatch, NativeError, TiermemError, own
from tiermem.lease import Lease
from tiermem.peer.address import is_remote
from tiermem.source.fill import Fill, Source
from tiermem.types import PAGE_BYTES, Manifest, TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes at `offset` of tensor number `tensor`."""

    tensor: int
    offset: int
    length: int


@dataclass(slots=True, eq=False)
class Task:
    """One read of at most a block of one file; without parts, a check of bytes that are already in memory."""

    tensors: tuple[int, ...]
    file: int = -1
    parts: tuple[Part, ...] = ()
    taken: bool = False


@dataclass(slots=True)
class Figures:
    """What a load cost so far. Thread seconds are summed over threads, so they may exceed `elapsed_s`."""

    check_only: bool
    started_s: float = field(default_factory=time.monotonic)
    elapsed_s: float = 0.0
    read_bytes: int = 0
    prefault_thread_s: float = 0.0
    read_thread_s: float = 0.0
    digest_thread_s: float = 0.0


def plan_reads(manifest: Manifest, segments: Iterable[int], block_bytes: int) -> list[Task]:
    """Reads of the tensors of `segments`, in file order, none crossing a multiple of `block_bytes` in its file.

    The parts of a read ascend and are disjoint: tensors that share bytes of their file are in reads of their own.
    """
    wanted = set(segments)
    blocks: dict[tuple[int, int], list[list[Part]]] = {}
    ends: dict[tuple[int, int], int] = {}
    empty = []
    for i, tensor in enumerate(manifest.tensors):
        if tensor.extent.segment not in wanted:
            continue
        if tensor.nbytes == 0:
            empty.append(Task((i,)))
        begin = at = tensor.file_offset
        while at < begin + tensor.nbytes:
            block = (tensor.file, at // block_bytes)
            stop = min(begin + tensor.nbytes, (block[1] + 1) * block_bytes)
            reads = blocks.setdefault(block, [])
            if at < ends.get(block, at + 1):
                reads.append([])
            reads[-1].append(Part(i, at - begin, stop - at))
            ends[block] = at = stop
    tasks = [
        Task(tuple(part.tensor for part in parts), file, tuple(parts))
        for (file, _), reads in blocks.items()
        for parts in reads
    ]
    return empty + tasks


def plan_checks(record: ModelRecord, segments: Iterable[int]) -> list[Task]:
    """Checks of every tensor of `segments`, whose bytes are in memory already."""
    return [Task((tensor,)) for segment in segments for tensor in record.tensors_of[segment]]


def readiness(load: Load | None, tensors: Iterable[int] | None) -> Future[None]:
    """When these tensors (None: all) of a model may be read: now, where no load of it is under way. Holds the lock."""
    if load is not None:
        return load.when_ready(tensors)
    future: Future[None] = Future()
    future.set_result(None)
    return future


class Load:
    """The load of some segments of a model. `lock` is the pool's; methods that need it say so."""

    def __init__(
        self,
        record: ModelRecord,
        segments: Mapping[int, _native.Segment],
        tasks: Sequence[Task],
        source: Source | None,
        stock: _native.Stock | None,
        lock: threading.RLock,
        on_segment: Callable[[Load, int], None],
        nodes: Mapping[int, int] | None = None,
    ) -> None:
        """`nodes`: by memory tier, the mask of NUMA nodes that its pages belong on; the first of them takes from the
        stock. Without it all pages are of one tier, and lie anywhere."""
        self.record = record
        self.segments = dict(segments)
        self.figures = Figures(source is None)
        self.finished: Future[None] = Future()
        self.error: Exception | None = None
        self.in_flight = 0
        self.begun = False
        self.filler: Lease | None = None  # who writes the bytes of an image, until it is sealed
        self._source = source
        self._stock = stock
        self._lock = lock
        self._on_segment = on_segment
        self._nodes = nodes
        self._queue = deque(tasks)
        self._urgent: deque[Task] = deque()
        self._left = len(tasks)
        self._tasks_of: dict[int, list[Task]] = {}
        for task in tasks:
            for tensor in task.tensors:
                self._tasks_of.setdefault(tensor, []).append(task)
        self._reads_left = {tensor: len(of) for tensor, of in self._tasks_of.items()}
        self._tensors_left = {s: len(record.tensors_of[s]) for s in segments}
        self._populating = threading.Lock()
        self._populated: set[int] = set()  # segments whose memory is all there
        self._paid: set[tuple[int, int]] = set()
        self._waiting: list[tuple[set[int], Future[None]]] = []

    def next_task(self) -> Task | None:
        """The next task to perform, wanted ones first; None too while as many are under way as its source is good for.
        Holds the lock."""
        most = None if self._source is None else self._source.reads_at_once
        if most is not None and self.in_flight >= most:
            return None
        for queue in (self._urgent, self._queue):
            while queue:
                task = queue.popleft()
                if not task.taken:
                    task.taken = True
                    self._left -= 1
                    self.in_flight += 1
                    return task
        return None

    @property
    def is_check(self) -> bool:
        """Nothing is read: bytes that an earlier pool left are digested."""
        return self._source is None

    @property
    def urgent(self) -> bool:
        return bool(self._urgent)

    @property
    def done(self) -> bool:
        """Nothing is queued or under way. Holds the lock."""
        return self.in_flight == 0 and self._left == 0

    def when_ready(self, tensors: Iterable[int] | None) -> Future[None]:
        """A future that ends when these tensors may be read, or all of the load (None). Holds the lock."""
        if tensors is None:
            return self.finished
        left = {i for i in tensors if not self.record.ready[i]}
        future: Future[None] = Future()
        if not left:
            future.set_result(None)
            return future
        self._urgent.extend(task for i in left for task in self._tasks_of.get(i, ()) if not task.taken)
        self._waiting.append((left, future))
        return future

    def fail(self, error: Exception) -> None:
        """Give up: nothing more is begun. Who waits is told when the last task under way has ended. Holds the lock."""
        if self.error is None:
            self.error = error
        self._queue.clear()
        self._urgent.clear()
        self._left = 0

    def end(self, error: Exception | None) -> None:
        """Tell everyone who waits how it ended."""
        self.figures.elapsed_s = time.monotonic() - self.figures.started_s
        if self._source is not None:
            self._source.close()
        waiting, self._waiting = self._waiting, []
        for future in (*(future for _, future in waiting), self.finished):
            if future.set_running_or_notify_cancel():
                future.set_exception(own(error)) if error else future.set_result(None)

    def outcome(self) -> Exception | None:
        """What stopped the load, or the change of its files that was found at its end."""
        if self.error is None:
            try:
                self._check_source()
            except TiermemError as changed:
                return changed
        return self.error

    def perform(self, task: Task, staging: _native.Staging) -> None:
        """Carry out a task: prefault, read, and for each tensor that is now whole digest and publish."""
        if task.parts:
            self._prefault(task)
            self._read(task, staging)
        with self._lock:
            whole = []
            for tensor in task.tensors:
                self._reads_left[tensor] -= 1
                if self._reads_left[tensor] == 0:
                    whole.append(tensor)
        for tensor in whole:
            self._publish(tensor)

    def prefault(self, threads: int) -> None:
        """Have memory behind every segment before somebody fills them. Raises CapacityError."""
        begin = time.monotonic()
        for segment in self.segments:
            self._populate(segment, 0, self.record.manifest.segments[segment].page_bytes, threads)
        self.figures.prefault_thread_s += time.monotonic() - begin

    def _prefault(self, task: Task) -> None:
        begin = time.monotonic()
        if self._source is not None and self._source.whole_segments:
            self._prefault_whole({self.record.manifest.tensors[part.tensor].extent.segment for part in task.parts})
        else:
            self._prefault_parts(task)
        with self._lock:
            self.figures.prefault_thread_s += time.monotonic() - begin

    def _prefault_whole(self, segments: set[int]) -> None:
        with self._populating:
            for segment in segments - self._populated:
                self._populate(segment, 0, self.record.manifest.segments[segment].page_bytes)
                self._populated.add(segment)

    def _prefault_parts(self, task: Task) -> None:
        ranges: dict[int, tuple[int, int]] = {}
        for part in task.parts:
            extent = self.record.manifest.tensors[part.tensor].extent
            first = (extent.offset + part.offset) // PAGE_BYTES * PAGE_BYTES
            last = extent.offset + part.offset + part.length
            low, high = ranges.get(extent.segment, (first, last))
            ranges[extent.segment] = (min(low, first), max(high, last))
        for segment, (first, last) in ranges.items():
            self._populate(segment, first, -(-(last - first) // PAGE_BYTES) * PAGE_BYTES)

    def _populate(self, segment: int, first: int, nbytes: int, threads: int = 1) -> None:
        """Prefault pages of a segment in the tiers that they were given, those of the first with memory that the stock
        gives back as far as it has any."""
        page = self.record.first_page[segment] + first // PAGE_BYTES
        tiers = self.record.placed[page : page + nbytes // PAGE_BYTES].tolist()
        for tier, run in groupby(enumerate(tiers), lambda pair: pair[1]):
            numbers = [number for number, _ in run]
            start, size = first + numbers[0] * PAGE_BYTES, len(numbers) * PAGE_BYTES
            nodes = self._nodes or {tier: 0}
            self._populate_in(segment, start, size, threads, nodes[tier], tier == next(iter(nodes)))

    def _populate_in(self, segment: int, first: int, nbytes: int, threads: int, nodes: int, from_stock: bool) -> None:
        pages = {(segment, page) for page in range(first, first + nbytes, PAGE_BYTES)}
        with self._lock:
            # Neighbouring tasks share a page; the stock gives for it once.
            fresh = pages - self._paid
            self._paid |= fresh
        if self._stock is not None and fresh and from_stock:
            self._stock.take(len(fresh) * PAGE_BYTES)
        while True:
            try:
                self.segments[segment].prefault(first, nbytes, threads, nodes)
                return
            except NativeError as error:
                # A step of the stock's filling that began before this load may have taken the room.
                if self._stock is None or not self._stock.take(nbytes):
                    layer = self.record.manifest.segments[segment].layer
                    raise CapacityError(
                        f"{self.record.name}: {nbytes} bytes of memory for {layer} could not be had: {error}; free "
                        "memory on the host or lower --tier"
                    ) from error

    def _read(self, task: Task, staging: _native.Staging) -> None:
        assert self._source is not None
        begin = time.monotonic()
        fills = []
        for part in task.parts:
            tensor = self.record.manifest.tensors[part.tensor]
            number, offset = tensor.extent.segment, tensor.extent.offset + part.offset
            address = self.segments[number].address + offset
            fills.append(Fill(tensor.file_offset + part.offset, part.length, address, part.tensor, number, offset))
        self._source.read(task.file, fills, staging)
        with self._lock:
            self.figures.read_bytes += sum(part.length for part in task.parts)
            self.figures.read_thread_s += time.monotonic() - begin

    def _publish(self, tensor: int) -> None:
        begin = time.monotonic()
        info = self.record.manifest.tensors[tensor]
        extent = info.extent
        with self.segments[extent.segment].buffer() as memory:
            digest = blake3(memory[extent.offset : extent.offset + extent.length]).digest()
        self._check_source()
        known = self.record.digests[tensor]
        if known is not None and known != digest:
            if self._source is None or not self._source.disbelieve(tensor):
                raise self._mismatch(info, digest, known)
            self._read_again(tensor)
            return
        with self._lock:
            self.record.digests[tensor] = digest
            self.record.ready[tensor] = True
            self.figures.digest_thread_s += time.monotonic() - begin
            self._tensors_left[extent.segment] -= 1
            segment_complete = self._tensors_left[extent.segment] == 0
            told = []
            for left, future in self._waiting:
                left.discard(tensor)
                if not left:
                    told.append(future)
            self._waiting = [(left, future) for left, future in self._waiting if left]
        if segment_complete:
            self._on_segment(self, extent.segment)
        for future in told:
            if future.set_running_or_notify_cancel():
                future.set_result(None)

    def _read_again(self, tensor: int) -> None:
        """Queue the reads of this tensor anew, and of no other that they brought."""
        with self._lock:
            if self.error is not None:
                return
            tasks = [
                Task((tensor,), task.file, tuple(part for part in task.parts if part.tensor == tensor))
                for task in self._tasks_of[tensor]
            ]
            self._tasks_of[tensor] = tasks
            self._reads_left[tensor] = len(tasks)
            self._left += len(tasks)
            self._urgent.extend(tasks)

    def _check_source(self) -> None:
        """Raise CheckpointChanged where the files changed since the load began."""
        if self._source is not None:
            self._source.check()

    def _mismatch(self, info: TensorInfo, digest: bytes, known: bytes) -> DigestMismatch:
        manifest = self.record.manifest
        remote = is_remote(manifest.path)
        path = manifest.path if remote else manifest.files[info.file].path
        if self.is_check:
            advice = (
                "the memory that an earlier daemon left is damaged and is given up: open the model again to have it "
            )
            advice += "fetched" if remote else "read"
        elif remote:
            advice = "it was altered by a pool that sent it, or on the way: load it again, and then look at these"
        else:
            advice = (
                "it was damaged, or changed without a new modification time: restore the file, or touch it if the "
                "change is meant"
            )
        return DigestMismatch(
            f"{self.record.name}: tensor {info.name!r} has digest {digest.hex()[:16]}, {known.hex()[:16]} is on record "
            f"for {path}; {advice}"
        )
