"""A peer that is asked for a model and lies: what does not agree with itself is refused, and its lease given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import CheckpointWriter
from tests.owner import Loop
from tiermem.checkpoint import open_checkpoint
from tiermem.errors import ModelNotFound, ProtocolError
from tiermem.peer.address import Address
from tiermem.peer.rdma import End, Region
from tiermem.peer.remote import RemoteModel, RemotePool
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.codec import encode_manifest
from tiermem.rpc.server import Caller, create_peer_server
from tiermem.types import Manifest


class Liar:
    """Handlers that answer with what they were given."""

    def __init__(self, manifest: Manifest) -> None:
        count = len(manifest.tensors)
        digests = tuple(bytes([i]) * 32 for i in range(count))
        self.opened = p.OpenReply("l1", manifest.identity, "m", encode_manifest(manifest), digests, b"\x0f")
        self.waited = p.WaitReply(b"\x0f", digests)
        self.granted = p.GrantReply((b"t" * 32,), 1.0)
        self.exported = p.ExportReply(p.QueuePairEnd(1, 2, bytes(16), 0, 4096), (p.MemoryRegion(4096, 8192, 7),))
        self.released: list[str] = []

    async def peerhello(self, request: p.HelloRequest, caller: Caller) -> AsyncGenerator[p.HelloEvent, None]:
        yield p.HelloEvent("welcome", b"token", "liar", m.PROTOCOL, 1)
        await asyncio.Event().wait()

    async def peerhave(self, request: p.HaveRequest, session: object) -> p.HaveReply:
        raise ModelNotFound("none")

    async def peeropen(self, request: p.OpenRequest, session: object) -> p.OpenReply:
        return self.opened

    async def peergrant(self, request: p.GrantRequest, session: object) -> p.GrantReply:
        return self.granted

    async def peerexport(self, request: p.ExportRequest, session: object) -> p.ExportReply:
        return self.exported

    async def peerwait(self, request: m.WaitRequest, session: object) -> p.WaitReply:
        return self.waited

    async def peerrelease(self, request: m.ReleaseRequest, session: object) -> m.Empty:
        self.released.append(request.lease_id)
        return m.Empty()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def manifest(checkpoint: CheckpointWriter) -> Manifest:
    return open_checkpoint(str(checkpoint().path))


@pytest.fixture
def liar(loop: Loop, manifest: Manifest) -> Iterator[tuple[Liar, RemotePool]]:
    liar = Liar(manifest)

    async def start() -> tuple[Any, int]:
        server = create_peer_server(liar, lambda caller: caller.token, 8)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(start())
    with RemotePool(Address("127.0.0.1", port), None) as remote:
        yield liar, remote
    loop.run(server.stop(0))


def test_what_agrees_is_taken(liar: tuple[Liar, RemotePool], manifest: Manifest) -> None:
    told, remote = liar
    model = remote.open(name="m")
    assert (model.manifest, model.digests, model.lease_id) == (manifest, told.opened.digests, "l1")
    assert told.released == []
    assert remote.wait(model, [1, 3, 0, 2])[1] == told.waited.digests


OPENS: dict[str, tuple[Callable[[p.OpenReply], p.OpenReply], str]] = {
    "another identity": (lambda reply: replace(reply, model_id="ff"), "another model than 'm'"),
    "no manifest": (lambda reply: replace(reply, manifest=b"\xc1"), "ManifestColumns is not msgpack"),
    "a cut manifest": (lambda reply: replace(reply, manifest=reply.manifest[:-1]), "ManifestColumns"),
    "too few digests": (lambda reply: replace(reply, digests=reply.digests[1:]), "no 4 digests of 32"),
    "a short digest": (lambda reply: replace(reply, digests=(b"x" * 31, *reply.digests[1:])), "no 4 digests of 32"),
    "too many bits": (lambda reply: replace(reply, ready=b"\x0f\x00"), "2 bytes of bits for 4 tensors"),
    "no bits": (lambda reply: replace(reply, ready=b""), "0 bytes of bits for 4 tensors"),
}


@pytest.mark.parametrize("lie", OPENS)
def test_an_open_that_does_not_agree_with_itself(liar: tuple[Liar, RemotePool], lie: str) -> None:
    told, remote = liar
    change, complaint = OPENS[lie]
    told.opened = change(told.opened)
    with pytest.raises(ProtocolError, match=complaint):
        remote.open(name="m")
    assert told.released == ["l1"]


def test_another_model_than_was_asked_for(liar: tuple[Liar, RemotePool], manifest: Manifest) -> None:
    told, remote = liar
    assert remote.open(identity=manifest.identity).manifest == manifest
    with pytest.raises(ProtocolError, match="another model than 'aa'"):
        remote.open(identity="aa")
    assert told.released == ["l1"]


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (p.WaitReply(b"\x0f", (b"", b"x" * 32)), "whose digests it does not know"),
        (p.WaitReply(b"\x0f", (b"x" * 32,)), "no 2 digests"),
        (p.WaitReply(b"", (b"x" * 32,) * 2), "0 bytes of bits"),
    ],
)
def test_a_wait_that_brings_something_else(
    liar: tuple[Liar, RemotePool], manifest: Manifest, reply: p.WaitReply, complaint: str
) -> None:
    told, remote = liar
    model: RemoteModel = remote.open(name="m")
    told.waited = reply
    with pytest.raises(ProtocolError, match=complaint):
        remote.wait(model, [0, 1])


def test_another_number_of_tokens(liar: tuple[Liar, RemotePool]) -> None:
    _, remote = liar
    assert remote.grant("l1", [0]) == (b"t" * 32,)
    with pytest.raises(ProtocolError, match="gave 1 tokens, not 2"):
        remote.grant("l1", [0], 2)


END = End(5, 6, bytes(16), 0, 1024)


def test_memory_that_is_exported(liar: tuple[Liar, RemotePool]) -> None:
    _, remote = liar
    end, regions = remote.export("l1", [3], END)
    assert (end.number, end.psn, end.mtu) == (1, 2, 4096)
    assert regions == {3: Region(4096, 8192, 7)}
    with pytest.raises(ProtocolError, match="exports 1 segments, not 2"):
        remote.export("l1", [3, 4], END)


@pytest.mark.parametrize(
    "reply",
    [
        p.ExportReply(p.QueuePairEnd(1 << 24, 2, bytes(16), 0, 4096), (p.MemoryRegion(4096, 8192, 7),)),
        p.ExportReply(p.QueuePairEnd(1, 2, bytes(15), 0, 4096), (p.MemoryRegion(4096, 8192, 7),)),
        p.ExportReply(p.QueuePairEnd(1, 2, bytes(16), 0, 4097), (p.MemoryRegion(4096, 8192, 7),)),
        p.ExportReply(p.QueuePairEnd(1, 2, bytes(16), 0, 4096), (p.MemoryRegion(0, 0, 7),)),
        p.ExportReply(p.QueuePairEnd(1, 2, bytes(16), 0, 4096), (p.MemoryRegion((1 << 64) - 1, 2, 7),)),
    ],
)
def test_what_no_device_has_is_not_taken(liar: tuple[Liar, RemotePool], reply: p.ExportReply) -> None:
    told, remote = liar
    told.exported = reply
    with pytest.raises(ProtocolError):
        remote.export("l1", [3], END)
