"""Vocabulary of the wire: a frozen dataclass for each request, reply and frame, explained in PROTOCOL.md. Never acts.

A field with a default may be left out on the wire, so adding such a field keeps the protocol's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROTOCOL = 1
"""Version that both ends must speak."""

SESSION_KEY = "tiermem-session-bin"
"""Metadata of every call: the token that the descriptor socket gave."""

ERROR_KEY = "tiermem-error-bin"
"""Trailing metadata of a failed call: an encoded Failure."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of tiermem.errors as it crosses the wire."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Empty:
    """A reply that says only: done."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """A lease that the client held of this pool's predecessor and still reads."""

    lease_id: str
    model_id: str


@dataclass(frozen=True, slots=True)
class AttachRequest:
    protocol: int
    pid: int
    leases: tuple[Announcement, ...] = ()


@dataclass(frozen=True, slots=True)
class AttachEvent:
    """`attached` comes first and carries the other fields; later kinds are orders to the client's agent (`ping`)."""

    kind: str
    pool_id: str | None = None
    protocol: int | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """`layers` maps tensor names to layers where the checkpoint's own names do not say."""

    path: str
    name: str | None = None
    layers: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class LoadReply:
    model_id: str
    name: str
    tensors: int
    segments: int
    nbytes: int
    ready_bytes: int


@dataclass(frozen=True, slots=True)
class SegmentGrant:
    """The right to fetch the descriptor of the model's segment number `index`, a file of `page_bytes` bytes."""

    key: str
    index: int
    page_bytes: int


@dataclass(frozen=True, slots=True)
class OpenRequest:
    path: str | None = None
    name: str | None = None
    layers: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class OpenReply:
    """`manifest` is for codec.decode_manifest; bit i (little-endian bit order) of `ready` is tensor i.

    `files` are the indices of the manifest's files that the opened path covers; None is all of them.
    """

    lease_id: str
    model_id: str
    name: str
    manifest: bytes
    segments: tuple[SegmentGrant, ...]
    ready: bytes
    files: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class WaitRequest:
    """Waits for `tensors` (indices in the manifest; they jump the loader's queue), or for the whole model if None."""

    lease_id: str
    tensors: tuple[int, ...] | None = None
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class WaitReply:
    ready: bytes
    segments: tuple[SegmentGrant, ...]


@dataclass(frozen=True, slots=True)
class ReleaseRequest:
    lease_id: str


@dataclass(frozen=True, slots=True)
class PinRequest:
    name: str


@dataclass(frozen=True, slots=True)
class UnpinRequest:
    name: str


@dataclass(frozen=True, slots=True)
class PinReply:
    pins: int


@dataclass(frozen=True, slots=True)
class EvictRequest:
    name: str


@dataclass(frozen=True, slots=True)
class EvictReply:
    evicted_bytes: int


@dataclass(frozen=True, slots=True)
class RemoveRequest:
    name: str


@dataclass(frozen=True, slots=True)
class RemoveReply:
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class StatusRequest:
    name: str | None = None


@dataclass(frozen=True, slots=True)
class StatusReply:
    """`body` is plain data; its sequences arrive as tuples."""

    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class DescriptorHello:
    """First frame of the descriptor socket, from the client."""

    protocol: int


@dataclass(frozen=True, slots=True)
class DescriptorWelcome:
    """Answer to the hello: the session's token, or why there is none."""

    token: bytes | None = None
    error: Failure | None = None


@dataclass(frozen=True, slots=True)
class DescriptorRequest:
    lease_id: str
    segments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DescriptorReply:
    """Carries one descriptor per entry of `segments`, in that order; or an error, which ends the answer."""

    segments: tuple[int, ...] = ()
    error: Failure | None = None
