"""Vocabulary of the wire for copies on devices: orders to a client's agent, and what it tells. Never acts.

As in messages.py, a field with a default may be left out. PROTOCOL.md explains them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CarryOrder:
    """`copy` or `drop` pages [first, first + pages) of a segment, by the client's carrier of that number."""

    order: int
    kind: str
    carrier: int
    segment: int
    first: int
    pages: int


@dataclass(frozen=True, slots=True)
class OrderResult:
    """An order was carried out, or why not."""

    order: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class ReplicasRequest:
    """What a carrier of a lease's model has on its device: bit i (little-endian bit order) of `pages` is page i of the
    model. `copied`: little-endian i32 page numbers, ascending, that were copied since the last report; `results` of
    orders that ended since then. `gone`: it will report no more, and has nothing. `registered`: the device reads the
    model's memory in this process by itself, so that its pages cannot move."""

    lease_id: str
    carrier: int
    device: str
    budget_bytes: int
    capacity_bytes: int
    pages: bytes
    copied: bytes = b""
    results: tuple[OrderResult, ...] = ()
    gone: bool = False
    registered: bool = False


@dataclass(frozen=True, slots=True)
class DigestsRequest:
    lease_id: str


@dataclass(frozen=True, slots=True)
class DigestsReply:
    """32 bytes for each tensor of the manifest; zeros where the digest is not known."""

    digests: bytes
