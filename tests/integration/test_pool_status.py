"""Every number and word of a pool's status, in a scenario small enough to know them all."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.certificates import Authority
from tests.conftest import CAP_SYS_NICE, CheckpointWriter, ConfigMaker, dram, has_capability
from tests.integration.conftest import PoolMaker
from tests.integration.daemon import Daemon
from tests.owner import Loop, Owner
from tiermem import _native
from tiermem.errors import ModelNotFound
from tiermem.peer.address import parse_address
from tiermem.source.file import FileSource
from tiermem.status import status_of
from tiermem.types import PAGE_BYTES

KIB, MIB = 1 << 10, 1 << 20
NO_EXPORTS = {"segments": 0, "pinned_bytes": 0, "queue_pairs": 0, "registrations": 0}
UNMEASURED: dict[str, Any] = {
    "nodes": [], "device": "", "online": True, "used_bytes": 0, "capacity_bytes": None, "idle_latency_s": None,
    "latency_s": None, "bandwidth_bytes_s": None,
}  # fmt: skip


def test_every_field_of_a_quiet_pool(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    began_s = time.time()
    pool = embedded(tier="dram=20MiB", backing="memfd", staging="4MiB", read_threads=2)
    written = checkpoint("llama", layers=3, kib=64)
    cold = pool.status()
    assert cold["models"] == []
    assert cold["staging_bytes"] == 0, "nothing is taken before something is read"
    pool.load(written.path)
    pool.pin("llama")
    model = pool.open("llama")
    status = pool.status()
    assert set(status) == {
        "pool", "migration", "sampling", "tiers", "devices", "spare", "staging_bytes", "remote", "models"
    }  # fmt: skip
    assert status["devices"] == []
    assert status["sampling"]["rung"] == "present"
    assert status["sampling"]["clients"] == [{"pid": os.getpid(), "leases": 1, "refused": "", "untrackable_pages": 0}]
    assert status["sampling"]["rungs"]["declared"]["pages"] == 3

    head = status["pool"]
    assert 0 <= head.pop("uptime_s") <= time.time() - began_s
    assert len(head.pop("id")) == 16
    assert head == {
        "pid": os.getpid(), "version": _native.version(), "backing": "memfd",
        "backing_reason": "anonymous memory on 4 KiB OS pages, lost with the daemon", 
        "catalog_error": "", "quarantined_loads": 0, "evicted_bytes": 0, "leases": 1,
    }  # fmt: skip
    assert status["tiers"] == [
        UNMEASURED | {"name": "dram", "kind": "dram", "capacity_bytes": 20 * MIB, "used_bytes": 3 * PAGE_BYTES},
        UNMEASURED | {"name": "disk", "kind": "disk", "capacity_bytes": None, "used_bytes": 0},
    ]
    migration = status["migration"]
    assert migration.pop("policy_cpu_s") >= 0
    assert migration == {
        "policy": "lru", "policy_failure": "", "policy_warnings": [], "period_s": 1.0, "plans": 0, "failures": 0,
        "control_cpu_s": 0.0, "ticks": 0, "quota_bytes_s": 1 << 30, "moved_bytes": 0, "moved_pages": {}, "refused": {},
        "moves_shared": has_capability(CAP_SYS_NICE),
    }  # fmt: skip
    assert status["spare"] == {"target_bytes": 0, "ready_bytes": 0, "prefault_s": 0.0}
    assert status["staging_bytes"] == 4 * MIB

    assert status["remote"].pop("transport")["name"] == "tcp"
    assert status["remote"] == {
        "listen": "", "data_port": 0, "tls": False, "tls_name": "", "peers": [], "served": [], "exports": NO_EXPORTS,
        "sent_bytes": 0, "connections": 0, "accepted": 0, "refused": 0, "cut": 0,
    }  # fmt: skip

    (entry,) = status["models"]
    figures = entry.pop("last_load")
    heat = entry.pop("heat")
    assert (heat["pages"], heat["known_pages"], heat["rungs"]) == (3, 0, ["declared"])
    assert entry == {
        "name": "llama", "path": str(written.path), "origin": "checkpoint", "identity": model.manifest.identity,
        "tensors": 6, "segments": 3, "bytes": written.nbytes, "page_bytes": 3 * PAGE_BYTES,
        "resident_bytes": 3 * PAGE_BYTES, "ready_bytes": written.nbytes, "state": "resident", "fingerprint": {},
        "leases": 1, "readers": [os.getpid()], "peers": [], "pins": 1, "opens": 1,
        "residency": {f"model.layers.{i}": "dram" for i in range(3)}, "replicas": {},
    }  # fmt: skip
    assert figures.pop("check_only") is False
    assert figures.pop("read_bytes") == written.nbytes
    assert set(figures) == {"elapsed_s", "prefault_thread_s", "read_thread_s", "digest_thread_s"}
    assert all(0 < seconds < 60 for seconds in figures.values())
    assert figures["prefault_thread_s"] + figures["read_thread_s"] <= 2 * figures["elapsed_s"]
    model.close()


def test_a_load_in_progress(embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    written, quiet = checkpoint("loading", files=2), checkpoint("quiet", seed=1)
    pool = embedded(read_threads=1)
    pool.load(quiet.path)
    second, go_on = threading.Event(), threading.Event()
    read = FileSource.read

    def slow(source: FileSource, file: int, *args: Any) -> None:
        if file == 1:
            second.set()
            assert go_on.wait(20)
        read(source, file, *args)

    monkeypatch.setattr(FileSource, "read", slow)
    model = pool.open(written.path)
    assert second.wait(20)
    status = pool.status("loading")
    (entry,) = status["models"]
    half = written.nbytes // 2
    assert entry["state"] == "loading"
    assert entry["ready_bytes"] == entry["last_load"]["read_bytes"] == half
    assert entry["resident_bytes"] == PAGE_BYTES
    assert entry["residency"] == model.residency() == {"model.layers.0": "dram", "model.layers.1": "loading"}
    first_s = entry["last_load"]["elapsed_s"]
    assert first_s > 0
    assert status["tiers"][0]["used_bytes"] == 4 * PAGE_BYTES, "memory on its way is counted"
    time.sleep(0.002)
    assert pool.status("loading")["models"][0]["last_load"]["elapsed_s"] > first_s
    go_on.set()
    model.wait()
    (entry,) = pool.status("loading")["models"]
    assert (entry["state"], entry["ready_bytes"]) == ("resident", written.nbytes)
    done_s = entry["last_load"]["elapsed_s"]
    time.sleep(0.002)
    assert pool.status("loading")["models"][0]["last_load"]["elapsed_s"] == done_s
    assert {entry["name"] for entry in pool.status()["models"]} == {"loading", "quiet"}
    model.close()


def test_what_a_load_cost_is_known_as_soon_as_it_is_done(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    pool = embedded()
    for i in range(20):
        written = checkpoint(f"m{i}", kib=4, seed=i)
        pool.load(written.path)
        figures = pool.status(f"m{i}")["models"][0]["last_load"]
        assert figures["read_bytes"] == written.nbytes


def test_counts_of_leases_opens_and_evictions(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    first, second = checkpoint("first"), checkpoint("second", seed=1)
    pool = embedded(tier=dram(2 * PAGE_BYTES))
    models = [pool.open(first.path) for _ in range(3)]
    status = pool.status()
    assert status["pool"]["leases"] == 3
    assert (status["models"][0]["leases"], status["models"][0]["opens"]) == (3, 3)
    for model in models:
        model.wait()
        model.close()
    deadline = time.monotonic() + 10
    while pool.status()["pool"]["leases"] and time.monotonic() < deadline:
        time.sleep(0.002)
    pool.load(second.path)
    status = pool.status()
    assert status["pool"]["evicted_bytes"] == 2 * PAGE_BYTES
    by_name = {entry["name"]: entry for entry in status["models"]}
    assert by_name["first"] | {"last_load": None} == {
        **by_name["first"], "state": "disk", "resident_bytes": 0, "ready_bytes": 0, "leases": 0, "readers": [],
        "opens": 3, "residency": {"model.layers.0": "disk", "model.layers.1": "disk"}, "last_load": None,
    }  # fmt: skip
    assert by_name["second"]["opens"] == 0, "a load is no open"


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def owner(loop: Loop, config: ConfigMaker, authority: Authority) -> Iterator[Owner]:
    """A pool that others fetch from, by TLS."""
    owner = Owner(loop, config, authority.issue("pool-a"))
    yield owner
    owner.close()


def test_what_two_pools_tell_of_each_other(
    owner: Owner, authority: Authority, embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    written, address = checkpoint("llama", layers=3), str(owner.address)
    owner.load(written.path)
    certificate = authority.issue("pool-b")
    pool = embedded(peer=address, **certificate.options)
    (row,) = pool.status()["remote"]["peers"]
    assert row == {
        "address": address, "configured": True, "connected": False, "error": "", "used_ago_s": None,
        "received_bytes": 0, "transport": None,
    }  # fmt: skip
    with pool.open("llama") as model:
        model.wait()
        (entry,) = pool.status()["models"]
        assert (entry["origin"], entry["path"]) == ("peer", f"tiermem://{address}/llama")
        assert (entry["readers"], entry["peers"]) == ([os.getpid()], [])
    (row,) = pool.status()["remote"]["peers"]
    assert 0 <= row.pop("used_ago_s") < 60
    assert row.pop("transport")["name"] == "tcp"
    assert row == {
        "address": address, "configured": True, "connected": True, "error": "", "received_bytes": written.nbytes,
    }  # fmt: skip
    with owner.connect(certificate) as remote:
        remote.open(name="llama")
        status = status_of(owner.pool)
        assert status["models"][0]["peers"] == ["pool-b (127.0.0.1)"]
        assert status["models"][0]["readers"] == [], "no process of this host reads it"
        told = status["remote"]
        assert told.pop("transport")["name"] == "tcp"
        assert told.pop("accepted") > 0
        assert told.pop("connections") >= 0
        assert told.pop("data_port") == remote.data.port
        assert told == {
            "listen": address, "tls": True, "tls_name": "pool-a", "peers": [], "exports": NO_EXPORTS,
            "sent_bytes": written.nbytes, "refused": 0, "cut": 0,
            "served": [{
                "peer": "pool-b", "hosts": ["127.0.0.1"], "sessions": 2, "leases": 1, "sent_bytes": written.nbytes,
            }],
        }  # fmt: skip


def test_why_a_peer_is_not_connected(owner: Owner, embedded: PoolMaker, tmp_path: Path) -> None:
    pool = embedded(peer=str(owner.address), **Authority(tmp_path, "other").issue("pool-b").options)
    with pytest.raises(ModelNotFound):
        pool.open("llama")
    (row,) = pool.status()["remote"]["peers"]
    assert (row["connected"], row["received_bytes"]) == (False, 0)
    assert "is not accepted" in row["error"]


def test_a_peer_that_lacks_a_model_has_not_failed(owner: Owner, authority: Authority, embedded: PoolMaker) -> None:
    pool = embedded(peer=str(owner.address), **authority.issue("pool-b").options)
    with pytest.raises(ModelNotFound):
        pool.open("what-nobody-has")
    (row,) = pool.status()["remote"]["peers"]
    assert (row["connected"], row["error"]) == (True, "")


def test_a_strangers_handshake_is_no_line_of_the_log(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path).issue("stranger")
    with Daemon("--listen", "127.0.0.1:0", *authority.issue("pool-c").flags) as daemon:
        address = parse_address(daemon.status()["remote"]["listen"])
        context = ssl.create_default_context(cafile=str(authority.cert))
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(stranger.cert, stranger.key)
        with (
            socket.create_connection((address.host, address.port), 20) as plain,
            suppress(OSError),
            context.wrap_socket(plain, server_hostname=address.host) as refused,
        ):
            refused.recv(1)
        assert "listening for peers" in daemon.log
        assert "Handshake failed" not in daemon.log
