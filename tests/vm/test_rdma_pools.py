"""Pools that read each other by RDMA on a real kernel: what users see of it, what moves meanwhile and what does not,
and when it goes by TCP instead."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.gate import Running
from tests.integration.weights import Weights, digest_of, write_weights
from tests.vm.tiered import ALL_SLOW, Tiered
from tiermem import _native
from tiermem.errors import AccessDenied, DaemonUnreachable, ReadError
from tiermem.peer.address import parse_address
from tiermem.peer.rdma import Device
from tiermem.peer.rdma_reader import RdmaConnection
from tiermem.peer.remote import RemotePool

pytestmark = [pytest.mark.rxe, pytest.mark.numa]

OWNER = "10.0.0.1:7070"
PATIENCE_S = 120.0


def with_pyverbs() -> Sequence[str]:
    """Daemons of tests see no environment but this."""
    return ("env", f"PYTHONPATH={os.environ['PYTHONPATH']}")


@pytest.fixture
def owner() -> Iterator[Daemon]:
    with Daemon("--listen", OWNER, "--insecure", tier="dram=128MiB", prefix=with_pyverbs()) as daemon:
        yield daemon
        eventually(lambda: daemon.leases() == 0, "all was given back", PATIENCE_S)
        assert "Traceback" not in daemon.log


@pytest.fixture
def here() -> Iterator[Daemon]:
    with Daemon("--peer", OWNER, "--insecure", tier="dram=128MiB", prefix=with_pyverbs()) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


def nbytes_of(weights: Weights) -> int:
    return sum(map(len, weights.tensors.values()))


def right(daemon: Daemon, weights: Weights) -> bool:
    with daemon.client() as client, client.open(weights.name) as model:
        return digest_of(model) == weights.digest


def peer_of(daemon: Daemon) -> dict[str, Any]:
    """What a daemon says of its one peer."""
    (row,) = daemon.status()["remote"]["peers"]
    return dict(row)


def exports_of(daemon: Daemon) -> dict[str, int]:
    return dict(daemon.status()["remote"]["exports"])


def test_a_model_comes_by_rdma_and_its_memory_is_unpinned_when_idle(
    owner: Daemon, here: Daemon, tmp_path: Path
) -> None:
    weights = write_weights(tmp_path / "far", layers=3, layer_bytes=(3 << 20) + 4096)
    assert owner.serves(weights)
    assert exports_of(owner) == {"segments": 0, "pinned_bytes": 0, "queue_pairs": 0, "registrations": 0}
    assert right(here, weights)
    row = peer_of(here)
    assert row["transport"] == {"name": "rdma", "reason": "both ends can"}
    assert row["received_bytes"] == nbytes_of(weights)
    remote = owner.status()["remote"]
    assert remote["transport"]["name"] == "rdma"
    assert remote["sent_bytes"] == 0, "nothing went by TCP"
    assert remote["exports"]["registrations"] == 3, "one for each segment, however many connections"
    eventually(lambda: exports_of(owner)["queue_pairs"] == 0, "connections ended with the load", PATIENCE_S)
    eventually(lambda: exports_of(owner)["pinned_bytes"] == 0, "unpinned", PATIENCE_S)

    with here.client() as client:
        client.evict("far")
    assert right(here, weights)
    assert exports_of(owner)["registrations"] == 6
    with owner.client() as client:
        eventually(lambda: owner.leases() == 0, "given back", PATIENCE_S)
        client.remove("far")  # pinned still, and given back at once
        assert exports_of(owner)["pinned_bytes"] == 0
    assert right(here, weights)


def test_users_can_say_tcp(owner: Daemon, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "far", layers=2)
    assert owner.serves(weights)
    flags = ("--peer", OWNER, "--insecure", "--transport", "tcp")
    with Daemon(*flags, prefix=with_pyverbs()) as here:
        assert right(here, weights)
        assert peer_of(here)["transport"] == {"name": "tcp", "reason": "--transport tcp is given"}
    assert owner.status()["remote"]["sent_bytes"] == nbytes_of(weights)


def test_who_may_not_open_the_device_reads_by_tcp(owner: Daemon, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "far", layers=2)
    assert owner.serves(weights)
    with Daemon("--peer", OWNER, "--insecure", ordinary=True, prefix=with_pyverbs()) as here:
        assert right(here, weights)
        told = peer_of(here)["transport"]
        assert told["name"] == "tcp"
        assert told["reason"]


def test_an_owner_that_is_killed_in_the_middle_is_missed(here: Daemon, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "far", layers=24, layer_bytes=4 << 20)
    with Daemon("--listen", OWNER, "--insecure", tier="dram=128MiB", prefix=with_pyverbs()) as owner:
        assert owner.serves(weights)

        def load() -> str:
            with here.client() as client:
                return client.load(f"tiermem://{OWNER}/far")

        loading = Running(load)
        with here.client() as client:
            eventually(lambda: any(m["ready_bytes"] for m in client.status()["models"]), "a part came", PATIENCE_S)
        owner.kill9()
        eventually(lambda: not loading.running, "the load ends", PATIENCE_S)
        with pytest.raises((ReadError, DaemonUnreachable)):
            loading.answer()
    assert "RDMA failed" in here.log
    eventually(lambda: not here.status()["models"], "nothing stays", PATIENCE_S)


class Fetcher:
    """A peer in this process that holds a lease on a model of the owner, and reads its segments by RDMA."""

    def __init__(self, name: str) -> None:
        with ExitStack() as made:
            address = parse_address(OWNER)
            self._remote = made.enter_context(RemotePool(address, None))
            device = Device()
            made.callback(device.close)
            self.lease = self._remote.open(name=name)
            manifest = self.lease.manifest
            self._segments = [
                _native.Segment.create(-1, f"reader's {i}", segment.page_bytes)
                for i, segment in enumerate(manifest.segments)
            ]
            for segment in self._segments:
                made.callback(segment.close)
                segment.prefault()
            self._buffers = {i: segment.buffer() for i, segment in enumerate(self._segments)}
            self.connection = made.enter_context(
                RdmaConnection(device, address, lambda end: self._export(end), PATIENCE_S, self._buffers)
            )
            self._ending = made.pop_all()

    def _export(self, end: Any) -> Any:
        return self._remote.export(self.lease.lease_id, range(len(self._segments)), end)

    def tensor(self, name: str) -> bytes:
        manifest = self.lease.manifest
        extent = manifest.tensors[manifest.by_name[name]].extent
        target = self._buffers[extent.segment][extent.offset : extent.offset + extent.length]
        target[:] = bytes(extent.length)
        assert list(self.connection.fetch_many([(extent.segment, extent.offset, target)])) == [0]
        return bytes(target)

    def release(self) -> None:
        self._remote.release(self.lease.lease_id)

    def close(self) -> None:
        self._ending.close()


def test_pages_that_are_read_stay_and_others_move(tmp_path: Path) -> None:
    """And once the lease has ended its queue pair and keys are good for nothing."""
    read, other = (write_weights(tmp_path / name, layers=2, layer_bytes=4 << 20) for name in ("read", "other"))
    flags = ("--listen", OWNER, "--insecure")
    with Tiered(*flags, dram="64MiB", prefix=with_pyverbs()) as pool:
        for weights in (read, other):
            pool.control.load(weights.path)
        fetcher = Fetcher("read")
        try:
            for name, data in read.tensors.items():
                assert fetcher.tensor(name) == data
            assert pool.control.status()["remote"]["exports"]["queue_pairs"] == 1
            pool.set_policy(ALL_SLOW)
            pool.wait_for("other", {page: "cxl" for page in range(4)}, PATIENCE_S)
            assert pool.tiers("read") == ["dram"] * 4
            for name, data in read.tensors.items():
                assert fetcher.tensor(name) == data
            fetcher.release()
            with pytest.raises((AccessDenied, DaemonUnreachable)):
                fetcher.tensor(next(iter(read.tensors)))
            pool.wait_for("read", {page: "cxl" for page in range(4)}, PATIENCE_S)
        finally:
            fetcher.close()
        assert right(pool, read)
