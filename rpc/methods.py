"""The table of methods: what may be called, with which messages, for how long, and whether twice. Never calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiermem.rpc import messages, peer_messages, replica_messages

SERVICE = "tiermem.Pool"

PEER_KEEPALIVE_S = 10.0
"""A peer, of either end, that is silent for so long is asked whether it lives, and given up after as long again."""


@dataclass(frozen=True, slots=True)
class Method:
    """A remote procedure. `deadline_s` None: no limit but the caller's. `idempotent`: may be sent again. `begins`: it
    begins the session, so it carries no token."""

    name: str
    request: type[Any]
    reply: type[Any]
    streams: bool = False
    idempotent: bool = False
    begins: bool = False
    deadline_s: float | None = 30.0

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.name}"


# Open is not idempotent, nor what opens or creates an image: each call is a new lease. Pins are counted. A second
# Remove would not find the model.
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("Attach", messages.AttachRequest, messages.AttachEvent, streams=True, deadline_s=None),
        Method("Load", messages.LoadRequest, messages.LoadReply, idempotent=True),
        Method("Open", messages.OpenRequest, messages.OpenReply),
        Method("ImageCreate", messages.ImageCreateRequest, messages.ImageCreateReply, deadline_s=None),
        Method("ImageSeal", messages.ImageSealRequest, messages.Empty, deadline_s=None),
        Method("ImageOpen", messages.ImageOpenRequest, messages.OpenReply),
        Method("Paths", messages.PathsRequest, messages.PathsReply, idempotent=True, deadline_s=10.0),
        Method("Wait", messages.WaitRequest, messages.WaitReply, idempotent=True, deadline_s=None),
        Method("Release", messages.ReleaseRequest, messages.Empty, idempotent=True, deadline_s=10.0),
        Method("Pin", messages.PinRequest, messages.PinReply, deadline_s=10.0),
        Method("Unpin", messages.UnpinRequest, messages.PinReply, deadline_s=10.0),
        Method("Evict", messages.EvictRequest, messages.EvictReply, idempotent=True),
        Method("Remove", messages.RemoveRequest, messages.RemoveReply),
        Method("Report", messages.ReportRequest, messages.Empty, deadline_s=10.0),
        Method("Replicas", replica_messages.ReplicasRequest, messages.Empty, idempotent=True, deadline_s=10.0),
        Method("Digests", replica_messages.DigestsRequest, replica_messages.DigestsReply, idempotent=True,
               deadline_s=10.0),
        Method("Heat", messages.HeatRequest, messages.HeatReply, idempotent=True, deadline_s=10.0),
        Method("PolicySet", messages.PolicySetRequest, messages.PolicySetReply, idempotent=True),
        Method("PolicyLog", messages.PolicyLogRequest, messages.PolicyLogReply, idempotent=True, deadline_s=10.0),
        Method("Watch", messages.WatchRequest, messages.WatchEvent, streams=True, deadline_s=None),
        Method("Status", messages.StatusRequest, messages.StatusReply, idempotent=True, deadline_s=10.0),
    )
}  # fmt: skip
"""What clients of the pool's own host may call, by name."""

PEER_METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("PeerHello", peer_messages.HelloRequest, peer_messages.HelloEvent, streams=True, begins=True,
               deadline_s=None),
        Method("PeerHave", peer_messages.HaveRequest, peer_messages.HaveReply, idempotent=True, deadline_s=10.0),
        Method("PeerOpen", peer_messages.OpenRequest, peer_messages.OpenReply),
        Method("PeerGrant", peer_messages.GrantRequest, peer_messages.GrantReply, idempotent=True, deadline_s=10.0),
        Method("PeerExport", peer_messages.ExportRequest, peer_messages.ExportReply, deadline_s=30.0),
        Method("PeerWait", messages.WaitRequest, peer_messages.WaitReply, idempotent=True, deadline_s=None),
        Method("PeerRelease", messages.ReleaseRequest, messages.Empty, idempotent=True, deadline_s=10.0),
    )
}  # fmt: skip
"""What other hosts' pools may call, by name."""
