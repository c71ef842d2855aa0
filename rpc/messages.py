"""Vocabulary of the wire: a frozen dataclass for each request, reply and frame, explained in PROTOCOL.md. Never acts.

A field with a default may be left out on the wire, so adding such a field keeps the protocol's version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiermem.rpc.replica_messages import CarryOrder
from tiermem.types import ImageTensor

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
class SamplingOrder:
    """How a client's agent samples its own page tables: by which rung (`off`: not at all), how often, for which part
    of its process's CPU time at most."""

    rung: str
    epoch_s: float
    budget: float


@dataclass(frozen=True, slots=True)
class AttachEvent:
    """`attached` comes first and carries the other fields; later kinds are orders to the client's agent: `ping`, which
    asks for nothing, `sample`, which carries `sampling`, and `carry`, to those that reported a carrier."""

    kind: str
    pool_id: str | None = None
    protocol: int | None = None
    refused: tuple[str, ...] = ()
    sampling: SamplingOrder | None = None
    carry: CarryOrder | None = None


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
class ImageCreateRequest:
    """An image's fingerprint, field by field, and its tensors in the order in which they lie."""

    fingerprint: dict[str, str]
    tensors: tuple[ImageTensor, ...]
    name: str | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class ImageCreateReply:
    """`draft`: nobody made it yet. Its descriptors are then writable, for the client to fill it and seal the lease."""

    draft: bool
    opened: OpenReply


@dataclass(frozen=True, slots=True)
class ImageSealRequest:
    lease_id: str


@dataclass(frozen=True, slots=True)
class ImageOpenRequest:
    """The image of that fingerprint; with a `name`, only if that one has it."""

    fingerprint: dict[str, str]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PathsRequest:
    name: str


@dataclass(frozen=True, slots=True)
class PathsReply:
    """The file of each segment, as processes of the pool's user on its host find it."""

    paths: tuple[str, ...]


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
class MappedReport:
    """The model of a lease lies at `address` of the client's memory since `since_s` (CLOCK_MONOTONIC), page by page."""

    lease_id: str
    address: int
    since_s: float


@dataclass(frozen=True, slots=True)
class WindowReport:
    """Pages of a lease's model that were sampled from `begin_s` to `end_s` (CLOCK_MONOTONIC): little-endian i32 page
    numbers, ascending, and a bit for each (little-endian bit order): was it touched."""

    lease_id: str
    begin_s: float
    end_s: float
    pages: bytes
    touched: bytes


@dataclass(frozen=True, slots=True)
class UntrackableReport:
    """So many pages of a lease's model cannot be sampled in this client."""

    lease_id: str
    pages: int


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """What a client's agent saw since its last report, and what that cost: CPU seconds of the agent, of the faults that
    its sampling caused, and of the rest of the process. `untrackable` tells of leases where that changed, `refused` why
    nothing, or not all, can be sampled."""

    rung: str
    mapped: tuple[MappedReport, ...] = ()
    windows: tuple[WindowReport, ...] = ()
    untrackable: tuple[UntrackableReport, ...] = ()
    agent_s: float = 0.0
    fault_s: float = 0.0
    client_s: float = 0.0
    refused: str = ""


@dataclass(frozen=True, slots=True)
class HeatRequest:
    name: str


@dataclass(frozen=True, slots=True)
class HeatReply:
    """Heat of each page of a model, by the columns of tiermem.heat.HeatColumns, little-endian: u32 `sampled` and
    `observed`, f32 `rate`, `age_s` and `sampled_age_s`, u8 `rung`. Layer i has pages[i] pages, in page order. i8 `tier`
    is an index in `tiers`, or negative while the page is on its way."""

    layers: tuple[str, ...]
    pages: tuple[int, ...]
    sampled: bytes
    observed: bytes
    rate: bytes
    age_s: bytes
    sampled_age_s: bytes
    rung: bytes
    tiers: tuple[str, ...]
    tier: bytes


@dataclass(frozen=True, slots=True)
class PolicySetRequest:
    """Puts a policy in charge: a shipped one by name, or a file of the pool's host by its absolute path."""

    name: str


@dataclass(frozen=True, slots=True)
class PolicySetReply:
    """`warnings`: what is odd about it."""

    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicyLogRequest:
    """The latest moves, newest first: all, of a model, or of one page of it."""

    model: str | None = None
    page: int | None = None
    limit: int = 1000


@dataclass(frozen=True, slots=True)
class MoveEntry:
    """Pages [first, first + pages) of a model; tiers by name. `outcome`: moved, evicted, copied, dropped, or the cause
    why not."""

    unix_s: float
    model: str
    first: int
    pages: int
    source: str
    target: str
    reason: str
    outcome: str


@dataclass(frozen=True, slots=True)
class PolicyLogReply:
    entries: tuple[MoveEntry, ...]


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """Asks for all that the pool observes from now on. Until the stream ends the clients sample as these fields say,
    where they are given."""

    epoch_s: float | None = None
    budget: float | None = None


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """Frames of a recording (tiermem.recording), ready to be written; `dropped` others found no room since the last
    event."""

    frames: bytes
    dropped: int = 0


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
