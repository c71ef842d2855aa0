"""Queue pair: one end of a reliable RDMA connection, which the device serves without any process at the far end.

Owns the queue pair and where its READs are told as done. Set up by hand: the two ends travel in control messages, so
there is no port to listen at. Never decides what is read.
"""

from __future__ import annotations

import os
import secrets
import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiermem.errors import Closed
from tiermem.peer.rdma import MTUS, REMOTE_READ, Device, Domain, End, Region, told

READ_BYTES = 1 << 20
"""Of one READ: what is lost and sent again where a packet is lost, so not more than keeps a fast link busy."""

READS_AT_ONCE = 4
"""READs of a queue pair that are under way at once, the others wait in the device. So few that devices at both ends can
be relied on for them and need not be asked, and enough for every link whose round trip carries less than 4 MiB."""

ACK_TIMEOUT, RETRIES = 17, 6
"""An end that answers nothing is given up after (1 + RETRIES) times 4.096 us * 2**ACK_TIMEOUT: 3.8 s. Devices may take
up to four times that (InfiniBand specification, 9.7.6.1.3); and with 7 retries Linux's soft-RoCE never gives up."""

_RELIABLE, _READ, _STATE, _ERROR = 2, 4, 1 << 0, 6
"""Numbers of infiniband/verbs.h: a kind of queue pair, an operation, one of a queue pair's attributes, its value."""

_RNR_TIMER, _RNR_RETRIES = 12, 7
_EVENTS = "anon_inode:[infinibandevent]"


@dataclass(frozen=True, slots=True)
class Completion:
    """A READ that ended: `status` of verbs.h, 0 for one whose bytes are there."""

    number: int
    status: int


class QueuePair:
    """A reliable connection of which one end reads and the other is read from. One thread at a time uses it."""

    def __init__(self, domain: Domain, reads: int) -> None:
        """`reads`: how many READs this end may have on their way; with 0 it is the end that is read from.

        Raises TransportUnavailable.
        """
        from pyverbs.cq import CQ
        from pyverbs.qp import QP, QPCap, QPInitAttr

        device = self._device = domain.device
        self._reads, self._closed = reads, False
        self._channel: Any = None
        with device.lock, told(f"{device.name} gives no further queue pair"):
            device.check()
            if reads:
                self._channel, events = _channel(device)
                self._poll = select.poll()
                self._poll.register(events, select.POLLIN)
            self._queue: Any = CQ(device.verbs, max(reads, 1), channel=self._channel)
            room = QPCap(max_send_wr=max(reads, 1), max_recv_wr=1, max_send_sge=1, max_recv_sge=1)
            kind = QPInitAttr(qp_type=_RELIABLE, scq=self._queue, rcq=self._queue, cap=room)
            self._pair: Any = QP(domain.verbs, kind)
        self.end = End(self._pair.qp_num, secrets.randbits(24), device.port.gid, device.port.lid, device.port.mtu)

    def connect(self, other: End) -> None:
        """Raises TransportUnavailable where the device finds no way to the other end."""
        from pyverbs.addr import GID, AHAttr, GlobalRoute
        from pyverbs.qp import QPAttr

        port, hexadecimal = self._device.port, other.gid.hex()
        gid = GID(":".join(hexadecimal[at : at + 4] for at in range(0, len(hexadecimal), 4)))
        afar = port.ethernet or other.gid[:8] != port.gid[:8]
        route = GlobalRoute(dgid=gid, sgid_index=port.gid_index, hop_limit=64)
        attributes = QPAttr(port_num=port.number)
        attributes.ah_attr = AHAttr(dlid=other.lid, is_global=int(afar), port_num=port.number, gr=route)
        attributes.qp_access_flags = 0 if self._reads else REMOTE_READ
        attributes.path_mtu = MTUS[min(port.mtu, other.mtu)]
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = other.number, other.psn, self.end.psn
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = READS_AT_ONCE
        attributes.min_rnr_timer, attributes.rnr_retry = _RNR_TIMER, _RNR_RETRIES
        attributes.timeout, attributes.retry_cnt = ACK_TIMEOUT, RETRIES
        with told(f"{self._device.name} finds no way to the queue pair {other.number} at {gid}"):
            if self._reads:
                self._pair.to_rts(attributes)
            else:
                self._pair.to_rtr(attributes)

    def read(self, number: int, target: int, local_key: int, source: Region) -> None:
        """Ask for the bytes of `source`; their completion has that number. At most `reads` may be on their way."""
        from pyverbs.wr import SGE, SendWR

        # Closed at once: most releases of pyverbs lose the memory of those that are left to be collected.
        with SGE(target, source.length, local_key) as piece, SendWR(number, _READ, 1, sg=[piece]) as request:
            request.set_wr_rdma(source.key, source.address)
            with self._device.lock, told(f"{self._device.name} takes no READ"):
                self._check()
                self._pair.post_send(request)

    def completed(self, timeout_s: float) -> list[Completion]:
        """The READs that ended, in their order. Waits for one; none where none came within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not (done := self._ended()):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not self._poll.poll(left_s * 1000):
                break
            with self._device.lock:
                self._check()
                self._channel.get_cq_event(self._queue)
                self._queue.ack_events(1)
        return done

    def end_reads(self) -> None:
        """Have all READs end with an error, from now on; any thread may."""
        from pyverbs.qp import QPAttr

        with self._device.lock, told(f"{self._device.name} does not end the READs of a queue pair"):
            if not (self._closed or self._device.closed):
                self._pair.modify(QPAttr(qp_state=_ERROR), _STATE)

    def close(self) -> None:
        """When it returns the device touches no memory on its behalf any more. Idempotent."""
        with self._device.lock:
            self._closed = True
            for each in (self._pair, self._queue, self._channel):
                if each is not None:
                    each.close()

    def _ended(self) -> list[Completion]:
        """The READs that have ended; where there are none, the next one makes an event."""
        with self._device.lock:
            self._check()
            count, found = self._queue.poll(self._reads)
            if not count:
                self._queue.req_notify()
                _, found = self._queue.poll(self._reads)  # it may have ended before that
        return [Completion(each.wr_id, each.status) for each in found]

    def _check(self) -> None:
        self._device.check()
        if self._closed:
            raise Closed("the queue pair is closed")


def _channel(device: Device) -> tuple[Any, int]:
    """A new channel of completion events, and its descriptor, which pyverbs before 57 does not tell."""
    from pyverbs.cq import CompChannel

    while True:
        before = _descriptors(_EVENTS)
        made = CompChannel(device.verbs)
        new = {made.fd} if hasattr(made, "fd") else _descriptors(_EVENTS) - before
        if len(new) == 1:
            return made, new.pop()
        made.close()  # somebody else in this process made one too


def _descriptors(target: str) -> set[int]:
    """Of this process, those that are links to `target`."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link) == target:
                found.add(int(link.name))
        except FileNotFoundError:
            continue
    return found
