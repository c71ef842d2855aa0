"""Reader: fills memory with extents of another host's segments by RDMA READs, which that host's processes never see.

Owns a queue pair, and a share in the registrations of the memory that it fills. As the receiver of TCP, it believes
nothing of what the bytes hold: whoever asked for them checks their digests before anybody sees them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tiermem.errors import AccessDenied, Closed, DaemonUnreachable, DeadlineExceeded, ProtocolError, Refused
from tiermem.peer.address import Address
from tiermem.peer.rdma import Device, End, Region, Registration, address_of
from tiermem.peer.rdma_pair import READ_BYTES, Completion, QueuePair
from tiermem.peer.receiver import WINDOW_BYTES, Want
from tiermem.peer.wire import MAX_EXTENT_BYTES, Request

READS = 64
"""READs on their way, at most, and of all of them at most WINDOW_BYTES."""

_FLUSHED, _DENIED, _SILENT = 5, 10, 12
"""Statuses of verbs.h: the queue pair was ended, the key is not good (any more), nobody answers."""


@dataclass(frozen=True, slots=True)
class Read:
    """`length` bytes of `request` from `at` on, which go to address `target`; for want number `want`."""

    want: int
    request: Request
    at: int
    length: int
    target: int

    @property
    def last(self) -> bool:
        return self.at + self.length == self.request.length


def plan(wants: Iterable[Want]) -> Iterator[Read]:
    """READs that fill the targets in order, none longer than READ_BYTES. Raises ProtocolError as TCP's requests do."""
    for number, (segment, offset, target) in enumerate(wants):
        request = Request(segment, offset, target.nbytes)
        if not 1 <= request.length <= MAX_EXTENT_BYTES:
            raise ProtocolError(f"{request} were asked for; 1 to {MAX_EXTENT_BYTES} bytes can be had at a time")
        address = address_of(target)
        for at in range(0, request.length, READ_BYTES):
            yield Read(number, request, at, min(READ_BYTES, request.length - at), address + at)


class RdmaConnection:
    """Used as a `DataConnection` is: one thread at a time uses and closes it, any may `cut` it."""

    def __init__(
        self,
        device: Device,
        address: Address,
        connect: Callable[[End], tuple[End, Mapping[int, Region]]],
        timeout_s: float,
        buffers: Mapping[int, memoryview],
    ) -> None:
        """`connect` has the peer at `address` connect a queue pair to an end. `buffers`: the memory that the targets of
        each segment lie in, which is pinned when the first of them is asked for, until the last connection of the
        device to it closes. `timeout_s`: how long a READ may take.

        Raises TransportUnavailable, and what `connect` raises.
        """
        self.address = address
        self.received_bytes = 0
        self.closed = False
        self._device, self._buffers, self._timeout_s = device, buffers, timeout_s
        self._registrations: dict[int, Registration] = {}
        self._pair = QueuePair(device.own, READS)
        try:
            other, self._regions = connect(self._pair.end)
            self._pair.connect(other)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def fetch_many(self, wants: Iterable[Want]) -> Generator[int, None, None]:
        """Fill targets in order, and give the number of each once it is full.

        An error closes the connection, as leaving before the end does: DaemonUnreachable (within seconds where the
        peer's host or process died), AccessDenied (it has withdrawn the memory), DeadlineExceeded, ProtocolError,
        Refused, TransportUnavailable, Closed. A target that was not given is not full.
        """
        if self.closed:
            raise Closed(f"the connection to {self.address} is closed; connect again")
        flying: deque[Read] = deque()
        left = plan(wants)
        try:
            while self._ask(left, flying):
                completions = self._pair.completed(self._timeout_s)
                if not completions:
                    self._judge(None, flying[0])
                for completion in completions:
                    read = flying.popleft()
                    self._judge(completion, read)
                    self.received_bytes += read.length
                    if read.last:
                        yield read.want
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Memory is not touched any more when it returns. Idempotent."""
        self.closed = True
        self._pair.close()
        while self._registrations:
            self._registrations.popitem()[1].close()

    def cut(self) -> None:
        """End it, so that the thread that waits for bytes is told."""
        self._pair.end_reads()

    def _ask(self, left: Iterator[Read], flying: deque[Read]) -> bool:
        """Have a whole window of READs on its way, while there are any; whether one has yet to end."""
        ahead = sum(read.length for read in flying)
        while len(flying) < READS and ahead < WINDOW_BYTES:
            read = next(left, None)
            if read is None:
                break
            local = self._registered(read)
            self._pair.read(read.want, read.target, local.local_key, self._source(read))
            flying.append(read)
            ahead += read.length
        return bool(flying)

    def _source(self, read: Read) -> Region:
        request = read.request
        region = self._regions.get(request.segment)
        if region is None or not 0 <= request.offset <= region.length - request.length:
            raise Refused(f"{self.address} exports no {request}; open the model again")
        return Region(region.address + request.offset + read.at, read.length, region.key)

    def _registered(self, read: Read) -> Registration:
        """The memory that a READ goes to."""
        segment = read.request.segment
        registration = self._registrations.get(segment)
        if registration is None:
            buffer = self._buffers.get(segment)
            if buffer is None:
                raise Refused(f"there is no memory for segment {segment}")
            registration = self._registrations[segment] = self._device.register(buffer, remote_read=False)
        if not registration.address <= read.target <= registration.address + registration.nbytes - read.length:
            raise Refused(f"the target of {read.request} lies outside of the memory for segment {segment}")
        return registration

    def _judge(self, completion: Completion | None, read: Read) -> None:
        """Raises what a READ ended with; None is one that did not."""
        came = f"{self.address}: {read.request}: {read.at} of {read.request.length} bytes came"
        if completion is None:
            raise DeadlineExceeded(f"{came}, and no more within {self._timeout_s:g} s")
        if completion.status == _DENIED:
            raise AccessDenied(f"{came}, then the peer refused to be read: the key is not good; open the model again")
        if completion.status == _FLUSHED:
            raise DaemonUnreachable(f"{came}, then this end was cut")
        if completion.status == _SILENT:
            raise DaemonUnreachable(f"{came}, then nobody answered at {self.address}; is that host up?")
        if completion.status:
            raise DaemonUnreachable(f"{came}, then the device failed with status {completion.status} of ibv_wc_status")
