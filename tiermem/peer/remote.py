"""Remote pool: another host's pool as this one calls it: what it has, leases, tokens. Carries no weights.

Nothing is believed for good: a manifest is checked in itself when it is decoded, bytes are checked against digests by
who receives them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from tiermem.content import content_of
from tiermem.errors import DaemonUnreachable, DeadlineExceeded, ProtocolError
from tiermem.peer.address import Address, foreign
from tiermem.peer.rdma import End, Region
from tiermem.peer.refusal import why_unreachable
from tiermem.peer.tls import Tls
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.channel import PeerChannel
from tiermem.rpc.codec import decode_manifest
from tiermem.types import Manifest

DIGEST_BYTES = 32
HELLO_TIMEOUT_S = 10.0

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A lease on a model of another pool. By tensor: `ready` when it was opened, and its BLAKE3, None where that pool
    does not know it yet."""

    lease_id: str
    name: str
    manifest: Manifest
    digests: tuple[bytes | None, ...]
    ready: Bits


class RemotePool:
    """A session with the pool at `address`; it and its leases end with `close`, or with the connection.

    Threads may share it. Raises DaemonUnreachable where no pool answers, AccessDenied where one of the two ends does
    not accept the other's certificate, DeadlineExceeded where it does not answer in time, ProtocolError.
    """

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.address = address
        self._tls = tls
        self._token = b""
        self._channel = PeerChannel(str(address), lambda: self._token, None if tls is None else tls.pem)
        try:
            welcome = self._hello()
        except BaseException:
            self._channel.close()
            raise
        self._token, self.id, self.rdma = welcome.token, welcome.pool_id, welcome.rdma
        self.data = Address(address.host, welcome.data_port)

    def have(self, *, name: str | None = None, identity: str | None = None) -> p.HaveReply:
        """Whether it has the model of that name or identity, and how much of it in memory. Raises ModelNotFound,
        AccessDenied."""
        reply: p.HaveReply = self._channel.call("PeerHave", p.HaveRequest(name, identity))
        return reply

    def open(
        self,
        *,
        name: str | None = None,
        identity: str | None = None,
        content: str | None = None,
        partial: bool = False,
    ) -> RemoteModel:
        """Lease the model of that name, identity or content; that pool begins to load what is missing of it, but for
        the last: that it has as a whole or, if `partial` will do, is receiving.

        Raises ModelNotFound, AccessDenied, Refused (a draft; too many fetches), and ProtocolError for a reply that is
        not consistent in itself.
        """
        reply: p.OpenReply = self._channel.call("PeerOpen", p.OpenRequest(name, identity, content, partial))
        try:
            manifest = decode_manifest(reply.manifest)
            count = len(manifest.tensors)
            digests = self._digests(reply.digests, count)
            same = identity is None or foreign(identity) == foreign(manifest.identity)
            if manifest.identity != reply.model_id or not same or content not in (None, content_of(manifest, digests)):
                wanted = name or identity or content
                raise ProtocolError(f"the pool at {self.address} sent another model than {wanted!r}")
            return RemoteModel(reply.lease_id, reply.name, manifest, digests, self._bits(reply.ready, count))
        except ProtocolError:
            self.release(reply.lease_id)
            raise

    def grant(self, lease_id: str, segments: Sequence[int], count: int = 1) -> tuple[bytes, ...]:
        """Tokens for `count` data connections, each good once and for these segments, and for a short time."""
        reply: p.GrantReply = self._channel.call("PeerGrant", p.GrantRequest(lease_id, tuple(segments), count))
        if len(reply.tokens) != count:
            raise ProtocolError(f"the pool at {self.address} gave {len(reply.tokens)} tokens, not {count}")
        return reply.tokens

    def export(self, lease_id: str, segments: Sequence[int], end: End) -> tuple[End, dict[int, Region]]:
        """Have that pool connect a queue pair of its own to this one's, for its segments to be read by RDMA.

        Raises Refused where it cannot, or not yet; TransportUnavailable.
        """
        request = p.ExportRequest(lease_id, tuple(segments), p.QueuePairEnd(*astuple(end)))
        reply: p.ExportReply = self._channel.call("PeerExport", request)
        regions = [Region(*astuple(region)) for region in reply.regions]
        if len(regions) != len(segments):
            raise ProtocolError(f"the pool at {self.address} exports {len(regions)} segments, not {len(segments)}")
        return End(*astuple(reply.end)), dict(zip(segments, regions, strict=True))

    def wait(
        self, model: RemoteModel, tensors: Sequence[int] | None = None, timeout_s: float | None = None
    ) -> tuple[Bits, tuple[bytes, ...]]:
        """Wait until that pool can send these tensors (None: all): which are ready there, and the digests of these.

        Raises the error of its load, and DeadlineExceeded.
        """
        wanted = None if tensors is None else tuple(tensors)
        reply: p.WaitReply = self._channel.call("PeerWait", m.WaitRequest(model.lease_id, wanted, timeout_s))
        count = len(model.manifest.tensors)
        digests = self._digests(reply.digests, count if wanted is None else len(wanted))
        known = tuple(digest for digest in digests if digest is not None)
        if len(known) != len(digests):
            raise ProtocolError(f"the pool at {self.address} calls tensors ready whose digests it does not know")
        return self._bits(reply.ready, count), known

    def release(self, lease_id: str) -> None:
        """End a lease, and with it whatever is on its way."""
        self._channel.call("PeerRelease", m.ReleaseRequest(lease_id))

    def close(self) -> None:
        """End the session and its leases."""
        self._channel.close()

    def __enter__(self) -> RemotePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hello(self) -> p.HelloEvent:
        # Kept: the session ends with the stream, and the stream with whoever holds it.
        self._stream = self._channel.stream("PeerHello", p.HelloRequest(m.PROTOCOL))
        late = threading.Timer(HELLO_TIMEOUT_S, self._stream.cancel)
        late.start()
        try:
            event: p.HelloEvent | None = next(self._stream, None)
        except DaemonUnreachable:
            raise why_unreachable(self.address, self._tls) from None
        finally:
            late.cancel()
        if event is None:
            raise DeadlineExceeded(f"the pool at {self.address} gave no answer within {HELLO_TIMEOUT_S:g} s")
        return event

    def _digests(self, digests: tuple[bytes, ...], count: int) -> tuple[bytes | None, ...]:
        if len(digests) != count or any(len(digest) not in (0, DIGEST_BYTES) for digest in digests):
            raise ProtocolError(f"the pool at {self.address} sent no {count} digests of {DIGEST_BYTES} bytes")
        return tuple(digest or None for digest in digests)

    def _bits(self, packed: bytes, count: int) -> Bits:
        if len(packed) != -(-count // 8):
            raise ProtocolError(f"the pool at {self.address} sent {len(packed)} bytes of bits for {count} tensors")
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=count, bitorder="little").astype(np.bool_)
