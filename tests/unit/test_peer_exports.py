"""What a peer gets of a pool whose memory can be read by RDMA, up to the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import CheckpointWriter, ConfigMaker, until
from tests.integration.gate import Gate
from tests.owner import Loop, Owner
from tiermem import errors, peer_listener
from tiermem.peer.rdma import End, Region


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def owner(loop: Loop, config: ConfigMaker) -> Iterator[Owner]:
    owner = Owner(loop, config, None)
    yield owner
    owner.close()


class Exports:
    """What exports, without a device."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.exported: list[tuple[str, list[str], list[int]]] = []
        self.withdrawn: list[str] = []

    def export(
        self, lease_id: str, segments: dict[int, tuple[str, memoryview]], end: End
    ) -> tuple[End, dict[int, Region]]:
        if self.error is not None:
            raise self.error
        memory = {number: buffer for number, (_, buffer) in segments.items()}
        self.exported.append((lease_id, [key for key, _ in segments.values()], [m.nbytes for m in memory.values()]))
        assert all(buffer.readonly for buffer in memory.values())
        return end, {number: Region(4096, buffer.nbytes, number) for number, buffer in memory.items()}

    def withdraw(self, lease_id: str) -> None:
        self.withdrawn.append(lease_id)


@pytest.fixture
def exporting(monkeypatch: pytest.MonkeyPatch, loop: Loop, config: ConfigMaker) -> Iterator[tuple[Owner, Exports]]:
    exports = Exports()
    monkeypatch.setattr(peer_listener, "_open_exporter", lambda *_: exports)
    owner = Owner(loop, config, None)
    yield owner, exports
    owner.close()


def test_memory_that_no_device_can_read_is_not_exported(owner: Owner, checkpoint: CheckpointWriter) -> None:
    owner.load(checkpoint().path)
    with owner.connect() as remote:
        assert not remote.rdma
        with pytest.raises(errors.Refused, match="cannot be read by RDMA; take TCP"):
            remote.export(remote.open(name="model").lease_id, [0], End(1, 0, bytes(16), 0, 4096))


def test_whole_segments_of_a_lease_are_exported_and_no_others(
    exporting: tuple[Owner, Exports], checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner, exports), end = exporting, End(7, 0, bytes(16), 0, 4096)
    gate, written = Gate(monkeypatch), checkpoint(layers=3)
    record, loaded = owner.pool.load(str(written.path))
    with owner.connect() as remote:
        assert remote.rdma
        model = remote.open(name="model")
        with pytest.raises(errors.Refused, match="not in memory as a whole yet; take TCP"):
            remote.export(model.lease_id, [0], end)
        gate.open()
        loaded.result(20)
        assert remote.export(model.lease_id, [0, 2], end)[1].keys() == {0, 2}
        sizes = [record.manifest.segments[i].page_bytes for i in (0, 2)]
        assert exports.exported == [(model.lease_id, [record.keys[0], record.keys[2]], sizes)]
        for asked in ([3], [-1], []):
            with pytest.raises(errors.ProtocolError, match="segments 0 to 2"):
                remote.export(model.lease_id, asked, end)
        remote.release(model.lease_id)
        assert exports.withdrawn == [model.lease_id]
        with pytest.raises(errors.Refused, match="not held"):
            remote.export(model.lease_id, [0], end)

        exports.error = errors.TransportUnavailable("nobody is at that end")
        model = remote.open(name="model")
        with pytest.raises(errors.TransportUnavailable):
            remote.export(model.lease_id, [0], end)
        exports.error = None
        with pytest.raises(errors.Refused, match="failed less than 60 s ago; take TCP"):
            remote.export(model.lease_id, [0], end)
    until(lambda: exports.withdrawn[1:] == [model.lease_id])
