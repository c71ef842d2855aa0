"""Carrying: the task of a client's agent that tells the pool what its carriers have, and has them obey its orders.

Owns the carriers of one client, and what the pool has not been told yet; used by the agent's thread alone, but where it
says otherwise. Never copies a byte, and never decides which.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np
import numpy.typing as npt

from tiermem.agent import Order
from tiermem.carrier import Carrier, Link
from tiermem.errors import DaemonUnreachable, DeadlineExceeded, TiermemError
from tiermem.rpc.replica_messages import CarryOrder, OrderResult, ReplicasRequest

_PAUSE_S = 0.05
"""Between two reports of a carrier that nobody waits for."""

_RETRY_S = 1.0
_log = logging.getLogger(__name__)


class _Link:
    """Keeps its carrier, and ends with it. `tell` and `leave` are orders to the agent, which `submit` gives it."""

    def __init__(self, carrier: Carrier, tell: Order, leave: Order, submit: Callable[[Order], None]) -> None:
        self.carrier = carrier
        self.stale = False
        self._tell, self._submit = tell, submit
        self._leave = weakref.finalize(self, submit, leave)
        self._leave.atexit = False

    def changed(self) -> None:
        if not self.stale:
            self.stale = True
            self._submit(self._tell)

    def close(self) -> None:
        self._leave()


@dataclass(slots=True)
class _Known:
    """A carrier as the agent has it. `due_s`: when the pool is to be told (monotonic); what it has not heard of are
    `copied` pages and `results`. `muted`: this pool does not want to hear of it."""

    lease_id: str
    device: str
    link: weakref.ref[_Link]
    due_s: float
    pages: bytes = b""
    copied: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    results: list[OrderResult] = field(default_factory=list)
    gone: bool = False
    muted: bool = False


class Carrying:
    """`send` delivers a report, or raises; `submit` gives the agent an order."""

    def __init__(self, send: Callable[[ReplicasRequest], object], submit: Callable[[Order], None]) -> None:
        self._send, self._submit = send, submit
        self._numbers = count()
        self._known: dict[int, _Known] = {}

    def add(self, lease_id: str, carrier: Carrier) -> Link:
        """From any thread: the carrier takes orders for a lease from now on, for as long as its link lives."""
        number = next(self._numbers)
        link = _Link(carrier, partial(self._stale, number), partial(self._gone, number), self._submit)
        known = _Known(lease_id, carrier.device, weakref.ref(link), time.monotonic())
        self._submit(partial(self._known.__setitem__, number, known))
        return link

    def remove(self, lease_id: str) -> None:
        """The lease ends, and the pool forgets its carriers."""
        self._known = {number: known for number, known in self._known.items() if known.lease_id != lease_id}

    def announce(self) -> None:
        """Another pool took the leases over: it knows of no carrier, and gave none of the orders."""
        for known in self._known.values():
            known.results.clear()
            known.muted, known.due_s = False, time.monotonic()

    def obey(self, order: CarryOrder) -> None:
        """Carry an order of the pool out, and tell it the result. Orders to a carrier that is gone are void."""
        known = self._known.get(order.carrier)
        link = known.link() if known is not None else None
        if known is None or link is None or known.gone:
            return
        known.results.append(OrderResult(order.order, _carry_out(link.carrier, order)))
        self._tell(order.carrier, known)

    def wake(self) -> None:
        """Telling is short."""

    @property
    def pause_s(self) -> float | None:
        due_s = min((known.due_s for known in self._known.values()), default=math.inf)
        return None if due_s == math.inf else due_s - time.monotonic()

    def run(self) -> None:
        now_s = time.monotonic()
        for number, known in list(self._known.items()):
            if known.due_s <= now_s:
                self._tell(number, known)

    def _stale(self, number: int) -> None:
        known = self._known.get(number)
        link = known.link() if known is not None else None
        if known is not None and link is not None and link.stale:  # else the answer to an order told of it
            known.due_s = min(known.due_s, time.monotonic() + _PAUSE_S)

    def _gone(self, number: int) -> None:
        if (known := self._known.get(number)) is not None:
            known.gone, known.due_s = True, -math.inf

    def _tell(self, number: int, known: _Known) -> None:
        known.due_s = math.inf
        request = self._request(number, known)
        if known.gone:
            del self._known[number]
        if known.muted or (known.gone and not request.pages):
            return
        try:
            self._send(request)
        except (DaemonUnreachable, DeadlineExceeded):
            known.due_s = time.monotonic() + _RETRY_S
            if known.gone:
                self._known[number] = known
            raise
        except TiermemError as error:
            # A pool that is older than carriers, or has given the lease up: it is not asked again.
            _log.info("the pool takes no reports of what is on %s: %s", known.device, error)
            known.muted = True
        known.results.clear()
        known.copied = known.copied[:0]

    def _request(self, number: int, known: _Known) -> ReplicasRequest:
        link, budget_bytes, capacity_bytes, registered = known.link(), 0, 0, False
        known.gone |= link is None
        if link is not None and not known.gone:
            link.stale, carrier = False, link.carrier
            try:
                known.pages = np.packbits(carrier.replicas(), bitorder="little").tobytes()
                known.copied = np.union1d(known.copied, carrier.take_copied()).astype("<i4")
                budget_bytes, capacity_bytes = carrier.budget_bytes, carrier.capacity_bytes
                registered = carrier.registered
            except TiermemError as error:
                _log.info("what was copied to %s is gone: %s", known.device, error)
                known.gone = True
        if known.gone:
            known.pages = bytes(len(known.pages))
        return ReplicasRequest(
            known.lease_id, number, known.device, budget_bytes, capacity_bytes, known.pages, known.copied.tobytes(),
            tuple(known.results), known.gone, registered,
        )  # fmt: skip


def _carry_out(carrier: Carrier, order: CarryOrder) -> str:
    """Why it could not be; empty where it was."""
    try:
        act = {"copy": carrier.copy, "drop": carrier.drop}[order.kind]
        act(order.segment, range(order.first, order.first + order.pages))
    except Exception as error:  # whatever the runtime of a device may raise: the pool waits for an answer
        _log.debug("an order for %s failed", carrier.device, exc_info=True)
        return str(error) or type(error).__name__
    return ""
