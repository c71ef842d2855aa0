"""Vocabulary of the wire between pools: the messages of PEER_METHODS, explained in PROTOCOL.md. Never acts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HelloRequest:
    """Begins a session, which ends with the stream of events."""

    protocol: int


@dataclass(frozen=True, slots=True)
class HelloEvent:
    """`welcome` comes first and carries the other fields: the session's token, the port of data connections, and
    whether the pool's memory can be read by RDMA too."""

    kind: str
    token: bytes = b""
    pool_id: str = ""
    protocol: int = 0
    data_port: int = 0
    rdma: bool = False


@dataclass(frozen=True, slots=True)
class HaveRequest:
    """Asks for one model, by its name or by its identity, without a lease: nothing is loaded for it.

    Who fetches the model under `lease_id` also asks who else has parts of it, and says where it listens itself, if it
    does: HOST:PORT, whose host may be 0.0.0.0 or [::] for the one that it calls from.
    """

    name: str | None = None
    identity: str | None = None
    lease_id: str | None = None
    listener: str | None = None


@dataclass(frozen=True, slots=True)
class HaveReply:
    """Bit i (little-endian bit order) of `ready`: the bytes of tensor i can be had now. `sources`: other pools
    (HOST:PORT) to be asked for them first, in that order; empty without a lease."""

    model_id: str
    name: str
    nbytes: int
    ready: bytes
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """Asks for a lease on one model, by its name, by its identity, or by its content (tiermem.content) whatever its
    name: of one that is there as a whole or, with `partial`, on its way."""

    name: str | None = None
    identity: str | None = None
    content: str | None = None
    partial: bool = False


@dataclass(frozen=True, slots=True)
class OpenReply:
    """`manifest` is for codec.decode_manifest. `digests`: BLAKE3 of each tensor, empty where the pool does not know it
    yet; PeerWait brings it with the tensor."""

    lease_id: str
    model_id: str
    name: str
    manifest: bytes
    digests: tuple[bytes, ...]
    ready: bytes


@dataclass(frozen=True, slots=True)
class GrantRequest:
    """Asks for `count` tokens, each for one data connection that may read these segments of the lease's model."""

    lease_id: str
    segments: tuple[int, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class GrantReply:
    """A data connection must begin with one of `tokens` within `ttl_s`."""

    tokens: tuple[bytes, ...]
    ttl_s: float


@dataclass(frozen=True, slots=True)
class QueuePairEnd:
    """One end of an RDMA connection, as verbs have it: `gid` is 16 bytes, `mtu` the bytes of a packet."""

    number: int
    psn: int
    gid: bytes
    lid: int
    mtu: int


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """`length` bytes at `address` of the pool's process, to be read with `key` by the queue pair that it came with."""

    address: int
    length: int
    key: int


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """Asks for a queue pair that is connected to `end`, by which these segments of the lease's model can be read."""

    lease_id: str
    segments: tuple[int, ...]
    end: QueuePairEnd


@dataclass(frozen=True, slots=True)
class ExportReply:
    """`regions`: each of the segments as a whole, in the order of the request."""

    end: QueuePairEnd
    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True, slots=True)
class WaitReply:
    """`digests`: BLAKE3 of each tensor that was waited for, in the order of the request, or of all."""

    ready: bytes
    digests: tuple[bytes, ...]
