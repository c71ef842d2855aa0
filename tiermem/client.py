"""Client: a connection to the daemon of this host, and the models opened through it.

Owns one channel, one descriptor connection and one agent thread per client. Never starts a daemon. When the daemon
dies, models that are open stay readable; the agent announces their leases to the next daemon at the same address.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem._native import Range
from tiermem.agent import Agent
from tiermem.attachment import Attachment
from tiermem.carrier import Carrier, Link
from tiermem.carrying import Carrying
from tiermem.config import descriptor_path, socket_path, value_of
from tiermem.digests import DIGEST_BYTES
from tiermem.draft import Draft, usable
from tiermem.errors import Closed, DaemonUnreachable, TiermemError
from tiermem.heat import HeatColumns
from tiermem.model import Model
from tiermem.observations import Rung
from tiermem.paths import absolute, path_or_name_of
from tiermem.reporting import Reporting
from tiermem.rpc import messages as m
from tiermem.rpc.channel import Stream
from tiermem.rpc.codec import decode_manifest
from tiermem.rpc.descriptors import DescriptorClient
from tiermem.rpc.replica_messages import CarryOrder, DigestsReply, DigestsRequest
from tiermem.sampler.client import member_of
from tiermem.statistics import ModelHeat
from tiermem.types import PAGE_BYTES, ImageTensor, Manifest

_REATTACH_PAUSES_S = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Between tries to find the next daemon; the last one repeats for as long as leases are held."""

_log = logging.getLogger(__name__)


class Client:
    """A client of the daemon at `address` (`unix:PATH`; default TIERMEM_ADDRESS or the host's socket).

    Threads may share it. Raises DaemonUnreachable where none answers, AccessDenied where it is another user's.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or str(value_of("address"))
        self._lock = threading.Lock()
        self._leases: dict[str, str] = {}
        self._closed = False
        self._session: Attachment | None = Attachment(self.address, {})
        self._reporting = Reporting(lambda request: self._call("Report", request))
        self._carrying = Carrying(lambda request: self._call("Replicas", request), lambda do: self._agent.submit(do))
        self._agent = Agent("tiermem-agent", self._reporting, self._carrying)
        self._watch(self._session)

    def open(
        self,
        path_or_name: str | os.PathLike[str],
        *,
        writable: bool = False,
        layers: Mapping[str, str] | None = None,
    ) -> Model:
        """Lease the model of a checkpoint path, or of a name in the pool, and begin to load what is missing.

        Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError, DaemonUnreachable.
        """
        path, name = path_or_name_of(path_or_name)
        session = self._live()
        reply = self._call("Open", m.OpenRequest(path, name, dict(layers) if layers else None), session)
        return Model(self._held(session, reply), writable)

    def create_image(
        self,
        fingerprint: Mapping[str, str],
        tensors: Iterable[ImageTensor],
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Draft | Model:
        """The image of that fingerprint: a Draft, for this process to fill and seal, or a Model where it exists.

        `fingerprint` names every input that the bytes depend on. Where another process fills the same image this waits
        for it, `timeout_s` at most, and takes over if that one dies. Raises CapacityError, ProtocolError,
        DeadlineExceeded, DaemonUnreachable.
        """
        request = m.ImageCreateRequest(dict(fingerprint), tuple(tensors), name, dict(metadata) if metadata else None)

        def create() -> Draft | Model:
            session = self._live()
            reply: m.ImageCreateReply = self._call("ImageCreate", request, session)
            holder = self._held(session, reply.opened)
            return Draft(holder, partial(self._seal, reply.opened.lease_id, session)) if reply.draft else Model(holder)

        return usable(create, timeout_s)

    def open_image(self, fingerprint: Mapping[str, str], *, name: str | None = None, writable: bool = False) -> Model:
        """The sealed image of that fingerprint; with a `name`, only that one. Waits while it is being filled.

        Raises ImageNotFound, which names the nearest image and where it differs, and FingerprintMismatch.
        """

        def find() -> Model:
            session = self._live()
            reply = self._call("ImageOpen", m.ImageOpenRequest(dict(fingerprint), name), session)
            return Model(self._held(session, reply), writable)

        return usable(find)

    def share_paths(self, name: str) -> tuple[str, ...]:
        """Path of each segment's file of a model, to open or link to; good until the model leaves memory, so pin it.

        Raises ModelNotFound, and Refused while the model is not whole in memory.
        """
        reply: m.PathsReply = self._call("Paths", m.PathsRequest(name))
        return reply.paths

    def load(
        self, path: str | os.PathLike[str], name: str | None = None, *, layers: Mapping[str, str] | None = None
    ) -> str:
        """Load a whole checkpoint; returns the model's name when it is resident."""
        session = self._live()
        request = m.OpenRequest(absolute(path), name, dict(layers) if layers else None)
        opened: m.OpenReply = self._call("Open", request, session)
        try:
            # Until the load has ended, not only until every tensor is there: at its end the files are looked at again.
            self._call("Wait", m.WaitRequest(opened.lease_id), session)
        finally:
            self._call("Release", m.ReleaseRequest(opened.lease_id), session)
        return opened.name

    def begin_load(
        self, path: str | os.PathLike[str], name: str | None = None, *, layers: Mapping[str, str] | None = None
    ) -> m.LoadReply:
        """Begin to load a checkpoint and return at once, with the model's name and size."""
        request = m.LoadRequest(absolute(path), name, dict(layers) if layers else None)
        reply: m.LoadReply = self._call("Load", request)
        return reply

    def pin(self, name: str) -> int:
        """Promise not to evict a model; returns its pins."""
        return int(self._call("Pin", m.PinRequest(name)).pins)

    def unpin(self, name: str) -> int:
        """Take one pin back; returns the pins left."""
        return int(self._call("Unpin", m.UnpinRequest(name)).pins)

    def evict(self, name: str) -> int:
        """Take a model out of memory; returns bytes freed. Raises Refused while it is leased or pinned."""
        self._agent.settle()  # what this process closed just now does not stand in the way
        return int(self._call("Evict", m.EvictRequest(name)).evicted_bytes)

    def remove(self, name: str) -> int:
        """Forget a model; returns bytes freed. Raises Refused while it is leased or pinned."""
        self._agent.settle()  # what this process closed just now does not stand in the way
        return int(self._call("Remove", m.RemoveRequest(name)).freed_bytes)

    def status(self, name: str | None = None) -> dict[str, Any]:
        """Tiers, models, loads and leases of the daemon as plain data."""
        body: dict[str, Any] = self._call("Status", m.StatusRequest(name)).body
        return body

    def heat(self, name: str) -> ModelHeat:
        """What was observed of each page of a model. Raises ModelNotFound."""
        reply: m.HeatReply = self._call("Heat", m.HeatRequest(name))
        tier = np.frombuffer(reply.tier, np.int8)
        return ModelHeat(tuple(zip(reply.layers, reply.pages, strict=True)), _columns(reply), reply.tiers, tier)

    def set_policy(self, name: str) -> tuple[str, ...]:
        """Put a policy in charge: a shipped one by name, or the file at an absolute path; returns what is odd about it.

        Raises ConfigError where it cannot be loaded; the old one stays then.
        """
        reply: m.PolicySetReply = self._call("PolicySet", m.PolicySetRequest(name))
        return reply.warnings

    def policy_log(
        self, model: str | None = None, page: int | None = None, limit: int = 1000
    ) -> tuple[m.MoveEntry, ...]:
        """The latest moves and refusals, newest first: all, of a model, or of one page of it. Raises ModelNotFound."""
        reply: m.PolicyLogReply = self._call("PolicyLog", m.PolicyLogRequest(model, page, limit))
        return reply.entries

    def watch(self, epoch_s: float | None = None, budget: float | None = None) -> Stream:
        """All that the pool observes from now on, as m.WatchEvent with frames of a recording. While this lasts, clients
        are sampled every `epoch_s` seconds, for at most the share `budget` of their CPU time, where that is more."""
        return self._live().channel.stream("Watch", m.WatchRequest(epoch_s, budget))

    def close(self) -> None:
        """End the connection and all leases. Arrays that were taken stay valid."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            session, self._session = self._session, None
        self._agent.close()
        if session is not None:
            session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the connection ------------------------------------------------------------------------------------------

    def _call(self, method: str, request: object, session: Attachment | None = None) -> Any:
        try:
            return (session or self._live()).channel.call(method, request)
        except Closed:
            if self._closed:
                raise
            # The agent was faster to learn that the daemon went, and closed the channel under this call.
            raise DaemonUnreachable(
                f"the daemon at {self.address} went away during {method}; start it with: tiermem serve"
            ) from None

    def _held(self, session: Attachment, reply: m.OpenReply) -> _Holder:
        with self._lock:
            self._leases[reply.lease_id] = reply.model_id
        return _Holder(self, session, reply)

    def _seal(self, lease_id: str, session: Attachment) -> None:
        self._call("ImageSeal", m.ImageSealRequest(lease_id), session)

    def _live(self) -> Attachment:
        session = self._session
        return session if session is not None else self._attach()

    def _attach(self) -> Attachment:
        """The session, connected anew if need be; leases that are held are announced."""
        with self._lock:
            if self._closed:
                raise Closed(f"the client of {self.address} is closed; connect again")
            if self._session is not None:
                return self._session
            session = Attachment(self.address, self._leases)
            for lease in session.refused:
                _log.warning("the new daemon at %s did not adopt the model of lease %s", self.address, lease)
                self._leases.pop(lease, None)
            self._session = session
        self._watch(session)
        return session

    def _watch(self, session: Attachment) -> None:
        session.stream.follow(partial(self._obey, session), lambda: self._agent.submit(partial(self._lost, session)))

    def _obey(self, session: Attachment, event: m.AttachEvent) -> None:
        """An order of the daemon to this process's agent; kinds that are not known are passed over."""
        if event.kind == "sample" and event.sampling is not None:
            self._agent.submit(partial(self._reporting.obey, event.sampling))
        elif event.kind == "carry" and event.carry is not None:
            self._agent.submit(partial(self._carry, session, event.carry))

    def _carry(self, session: Attachment, order: CarryOrder) -> None:
        if self._session is session:  # else the next daemon would hear of an order that it never gave
            self._carrying.obey(order)

    def _mapped(self, lease_id: str, mapping: Range) -> None:
        member = member_of(lease_id, mapping, mapping.nbytes // PAGE_BYTES)
        self._agent.submit(partial(self._reporting.add, lease_id, member, time.monotonic()))

    def _lost(self, session: Attachment) -> None:
        """The daemon went: look for the next one for as long as there are leases to announce to it."""
        with self._lock:
            if self._closed or self._session is not session:
                return
            self._session = None
        session.close()
        tries = 0
        while self._leases and not self._closed:
            try:
                self._attach()
                self._reporting.announce()
                self._carrying.announce()
            except TiermemError as error:
                _log.debug("no daemon yet: %s", error)
                time.sleep(_REATTACH_PAUSES_S[min(tries, len(_REATTACH_PAUSES_S) - 1)])
                tries += 1
            else:
                return

    def _release(self, lease_id: str) -> None:
        self._agent.submit(partial(self._end_lease, lease_id))

    def _end_lease(self, lease_id: str) -> None:
        self._reporting.remove(lease_id)
        self._carrying.remove(lease_id)
        with self._lock:
            known = self._leases.pop(lease_id, None)
            session = self._session
        if known is not None and session is not None:
            session.channel.call("Release", m.ReleaseRequest(lease_id))


@lru_cache(maxsize=64)
def _manifest(encoded: bytes) -> Manifest:
    """Decoded once per model, since engines open one model many times."""
    return decode_manifest(encoded)


def _columns(reply: m.HeatReply) -> HeatColumns:
    rung, age_s = np.frombuffer(reply.rung, np.uint8), np.frombuffer(reply.age_s, np.float32)
    return HeatColumns(
        np.frombuffer(reply.sampled, np.uint32), np.frombuffer(reply.observed, np.uint32),
        np.frombuffer(reply.rate, np.float32), age_s, np.frombuffer(reply.sampled_age_s, np.float32),
        time.monotonic() - age_s.astype(np.float64), rung, rung >= Rung.ACCESSED,
    )  # fmt: skip


class _Holder:
    """A lease on a model of a daemon."""

    def __init__(self, client: Client, session: Attachment, reply: m.OpenReply) -> None:
        self.name = reply.name
        self.model_id = reply.model_id
        self.manifest = _manifest(reply.manifest)
        self.files = reply.files
        self.ready = self._unpacked(reply.ready)
        self._client = client
        self._session = session
        self._lease_id = reply.lease_id

    def descriptors(self, segments: Sequence[int]) -> dict[int, int]:
        return self._session.descriptors.fetch(self._lease_id, segments)

    def wait(self, tensors: Sequence[int] | None, timeout_s: float | None) -> None:
        wanted = None if tensors is None else tuple(tensors)
        self._client._call("Wait", m.WaitRequest(self._lease_id, wanted, timeout_s))

    def residency(self) -> dict[str, str]:
        body = self._client._call("Status", m.StatusRequest(self.name)).body
        return dict(body["models"][0]["residency"])

    def mapped(self, mapping: Range) -> None:
        self._client._mapped(self._lease_id, mapping)

    def pinned(self, pages: Sequence[int]) -> None:
        self._client._agent.submit(partial(self._client._reporting.mark_pinned, self._lease_id, pages))

    def carry(self, carrier: Carrier) -> Link:
        return self._client._carrying.add(self._lease_id, carrier)

    def digests(self) -> list[bytes | None]:
        reply: DigestsReply = self._client._call("Digests", DigestsRequest(self._lease_id))
        found = (reply.digests[i : i + DIGEST_BYTES] for i in range(0, len(reply.digests), DIGEST_BYTES))
        return [digest if any(digest) else None for digest in found]

    def release(self) -> None:
        self._client._release(self._lease_id)

    def _unpacked(self, bits: bytes) -> npt.NDArray[np.bool_]:
        count = len(self.manifest.tensors)
        return np.unpackbits(np.frombuffer(bits, np.uint8), count=count, bitorder="little").astype(np.bool_)


_clients: dict[tuple[int, str], Client] = {}
_clients_lock = threading.Lock()


def shared_client(address: str | None = None) -> Client:
    """This process's client of a daemon, made at first use; a forked child gets one of its own."""
    key = (os.getpid(), address or str(value_of("address")))
    with _clients_lock:
        client = _clients.get(key)
        if client is None or client._closed:
            client = _clients[key] = Client(key[1])
        return client


def daemon_answers(address: str) -> bool:
    """Whether a daemon listens at `address`."""
    try:
        DescriptorClient(str(descriptor_path(socket_path(address))), timeout_s=1.0).close()
    except TiermemError:
        return False
    return True
