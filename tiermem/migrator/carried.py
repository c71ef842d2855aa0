"""Carried: what one carrier of a client has on its device, and the orders that it has yet to answer. Never decides.

What a client tells is checked here before anything is believed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord
from tiermem.errors import ProtocolError
from tiermem.lease import Lease
from tiermem.rpc.replica_messages import ReplicasRequest
from tiermem.tier import Tier
from tiermem.tier_spec import device_name
from tiermem.types import PAGE_BYTES
from tiermem.view import Piece

_MOST_BYTES = 1 << 60


@dataclass(slots=True, eq=False)
class Order:
    """To copy or drop a piece. `ended` is set once it was answered, or nobody is left to; `late` says that who gave it
    waits no more."""

    kind: str
    piece: Piece
    source: Tier
    target: Tier
    reason: str
    error: str = ""
    late: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def reserved_bytes(self) -> int:
        """Room that is kept for it in its target."""
        return len(self.piece.pages) * PAGE_BYTES if self.kind == "copy" else 0


@dataclass(slots=True, eq=False)
class Carried:
    """`tier`: the pool's tier of that device, None where it has none. `pages`: one entry a page of the model. `number`
    is the client's, `orders` by the pool's numbers. `registered`: its device reads the model's memory by itself."""

    lease: Lease
    record: ModelRecord
    number: int
    device: str
    tier: Tier | None
    pages: npt.NDArray[np.bool_]
    budget_bytes: int = 0
    capacity_bytes: int = 0
    registered: bool = False
    orders: dict[int, Order] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        """Of pages that are on the device as a whole."""
        return int(self.pages.sum()) * PAGE_BYTES

    def dropping(self, piece: Piece) -> bool:
        """Whether it has yet to answer an order to drop all of the piece."""
        return any(
            order.kind == "drop" and order.piece.segment == piece.segment
            and order.piece.pages.start <= piece.pages.start and piece.pages.stop <= order.piece.pages.stop
            for order in self.orders.values()
        )  # fmt: skip


def pages_of(record: ModelRecord, request: ReplicasRequest) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
    """The pages that a carrier has, one entry a page, and the numbers of those that it copied just now.

    Raises ProtocolError for what no carrier of this model can have.
    """
    what, count = f"carrier {request.carrier} of lease {request.lease_id}", record.first_page[-1]
    numbers = (request.carrier, request.budget_bytes, request.capacity_bytes)
    if not all(0 <= number < _MOST_BYTES for number in numbers):
        raise ProtocolError(f"{what}: a budget of {numbers[1]} bytes of {numbers[2]}: each must be from 0 to 2^60")
    try:
        canonical = device_name(request.device)
    except ValueError as error:
        raise ProtocolError(f"{what}: {error}") from None
    if canonical != request.device:
        raise ProtocolError(f"{what}: device {request.device!r} is called {canonical!r}")
    if len(request.pages) != -(-count // 8):
        raise ProtocolError(f"{what}: {len(request.pages)} bytes of bits for {count} pages")
    bits = np.unpackbits(np.frombuffer(request.pages, np.uint8), bitorder="little").astype(np.bool_)
    if bits[count:].any() or (request.gone and bits.any()):
        raise ProtocolError(f"{what}: it cannot have a page beyond {count - 1}, nor any once it is gone")
    if len(request.copied) % 4:
        raise ProtocolError(f"{what}: {len(request.copied)} bytes are no i32 page numbers")
    copied = np.frombuffer(request.copied, "<i4")
    if len(copied) and (copied[0] < 0 or copied[-1] >= count or (np.diff(copied.astype(np.int64)) <= 0).any()):
        raise ProtocolError(f"{what}: page numbers must ascend from 0 to {count - 1}")
    return bits[:count], copied
