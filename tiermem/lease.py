"""Lease table: who reads which model. Grants and ends leases; never touches bytes, and never outlives a session."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tiermem.catalog import ModelRecord
from tiermem.errors import Refused
from tiermem.rpc.replica_messages import CarryOrder


@dataclass(slots=True)
class Session:
    """One connected client. All its leases end with it, and once it has `ended` it gets no more. `give` passes an order
    to its agent, at once and from any thread; None while no agent listens."""

    pid: int
    uid: int
    ended: bool = False
    give: Callable[[CarryOrder], object] | None = None


@dataclass(slots=True, eq=False)
class Lease:
    """A session's right to read a model in place. `error` ended the load of the segments that it is for."""

    id: str
    model_id: str
    session: Session
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """What an open gives: the lease, the model, and which of its files the opened path is (None: all)."""

    lease: Lease
    record: ModelRecord
    files: tuple[int, ...] | None


class LeaseTable:
    """All leases of a pool. Guarded by the pool's lock."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._per_model: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def grant(self, model_id: str, session: Session, lease_id: str | None = None) -> Lease:
        """A new lease; `lease_id` is given only where a client brings one from before a restart."""
        lease = Lease(lease_id or secrets.token_hex(8), model_id, session)
        if lease.id in self._leases:
            raise Refused(f"lease {lease.id} is already held by process {self._leases[lease.id].session.pid}")
        self._leases[lease.id] = lease
        self._per_model[model_id] += 1
        return lease

    def get(self, lease_id: str, session: Session) -> Lease:
        """The session's own lease of that id. Raises Refused for one that ended or is another's."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.session is not session:
            raise Refused(f"lease {lease_id!r} is not held by this client; open the model again")
        return lease

    def release(self, lease: Lease) -> bool:
        """End a lease; False where it had ended, since a client and its connection may both end it."""
        if self._leases.pop(lease.id, None) is None:
            return False
        self._per_model[lease.model_id] -= 1
        return True

    def fail(self, model_id: str, error: Exception) -> None:
        """The segments that the holders of these leases mapped are given up; a later load makes others."""
        for lease in self._leases.values():
            if lease.model_id == model_id:
                lease.error = error

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def of_session(self, session: Session) -> list[Lease]:
        return [lease for lease in self._leases.values() if lease.session is session]

    def holders(self, model_id: str) -> int:
        """Number of leases on a model."""
        return self._per_model[model_id]

    def pids(self, model_id: str) -> list[int]:
        """Processes that hold a lease on a model, ascending."""
        return sorted({lease.session.pid for lease in self._leases.values() if lease.model_id == model_id})

    def check(self) -> None:
        counted = Counter(lease.model_id for lease in self._leases.values())
        assert counted == +self._per_model, "lease counts differ from the leases"
