"""Clients of one daemon: what they are given, that they share it, and that nothing of them stays when they go."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.faulty_disk import FaultyDisk
from tests.integration.weights import Weights, digest_of, layer, write_weights
from tiermem.errors import CapacityError, Closed, DeadlineExceeded, ModelNotFound, Refused
from tiermem.rpc import messages
from tiermem.types import PAGE_BYTES


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(tier="dram=16MiB") as daemon:
        yield daemon
        assert daemon.leases() == 0


@pytest.fixture
def weights(daemon: Daemon, tmp_path: Path) -> Iterator[Weights]:
    """Three layers in three files; the daemon forgets them afterwards."""
    yield write_weights(tmp_path / f"weights-{tmp_path.name}", layers=3, files=3)
    eventually(lambda: daemon.leases() == 0, "the test's leases ended")
    with daemon.client() as client:
        for model in client.status()["models"]:
            client.remove(model["name"])


@pytest.fixture
def disk(weights: Weights, tmp_path: Path) -> Iterator[FaultyDisk]:
    """Shows the weights again, and can stop their reader."""
    with FaultyDisk(weights.path, tmp_path / "disk") as disk:
        yield disk


def test_model_is_loaded_pinned_evicted_read_again_and_removed(daemon: Daemon, weights: Weights) -> None:
    with daemon.client() as client:
        assert client.load(weights.path) == weights.name
        status = daemon.model(weights.name)
        assert (status["state"], status["resident_bytes"]) == ("resident", 3 * PAGE_BYTES)
        assert status["last_load"]["read_bytes"] == sum(map(len, weights.tensors.values()))
        assert client.pin(weights.name) == 1
        with pytest.raises(Refused, match="pinned 1 times"):
            client.evict(weights.name)
        assert client.unpin(weights.name) == 0
        with pytest.raises(Refused, match="is not pinned"):
            client.unpin(weights.name)
        assert client.evict(weights.name) == 3 * PAGE_BYTES
        status = daemon.model(weights.name)
        assert (status["state"], status["resident_bytes"], status["ready_bytes"]) == ("disk", 0, 0)
        with client.open(weights.name) as model:
            assert digest_of(model) == weights.digest
            assert set(model.residency().values()) == {"dram"}
        eventually(lambda: not daemon.model(weights.name)["leases"], "the lease ended")
        assert client.remove(weights.name) == 3 * PAGE_BYTES
        with pytest.raises(ModelNotFound, match="load it first"):
            client.open(weights.name)
    assert daemon.status()["tiers"][0]["used_bytes"] == 0


@pytest.mark.root
def test_tensor_is_read_while_the_rest_still_loads(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    gate = disk.gate(weights.files[1].name, 100_000)
    with daemon.client() as client, client.open(disk.path) as model:
        assert model[layer(0)].tobytes() == weights.tensors[layer(0)]
        assert model[layer(2)].tobytes() == weights.tensors[layer(2)]
        gate.await_reached()
        with pytest.raises(DeadlineExceeded, match="wait longer"):
            model.wait([layer(1)], timeout_s=0.05)
        status = daemon.model("disk")
        assert (status["state"], status["ready_bytes"]) == ("loading", 400_000)
        residency = {f"model.layers.{i}": "loading" if i == 1 else "dram" for i in range(3)}
        assert model.residency() == residency
        gate.open()
        assert digest_of(model) == weights.digest


@pytest.mark.root
def test_wanted_tensor_is_read_before_others(weights: Weights, disk: FaultyDisk) -> None:
    first, second = (disk.gate(weights.files[i].name, 100_000) for i in range(2))
    with (
        Daemon("--read-threads", "1") as daemon,
        daemon.client() as client,
        client.open(disk.path) as model,
    ):
        first.await_reached()
        with pytest.raises(DeadlineExceeded):
            model.wait([layer(2)], timeout_s=0.05)
        first.open()
        assert model[layer(2)].tobytes() == weights.tensors[layer(2)]
        second.await_reached()
        assert daemon.model("disk")["ready_bytes"] == 400_000
        second.open()
        model.wait()


READER = """
with tiermem.open(sys.argv[1], address=sys.argv[2]) as model:
    say(digest_of(model))
    pause()
"""


def test_eight_processes_read_one_copy(weights: Weights) -> None:
    # A sampler would unmap what it looks for, and memory that is not mapped is in no process's share.
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon("--sampler", "off"))
        readers = [stack.enter_context(Child.script(READER, weights.path, daemon.address)) for _ in range(8)]
        assert {reader.line() for reader in readers} == {weights.digest}
        status = daemon.model(weights.name)
        assert (status["opens"], status["leases"]) == (8, 8)
        assert status["readers"] == tuple(sorted(reader.pid for reader in readers))
        assert daemon.status()["tiers"][0]["used_bytes"] == 3 * PAGE_BYTES
        mapped = [_mapped_segments(pid) for pid in (daemon.pid, *(reader.pid for reader in readers))]
        # Proportional set size shares a page out among those who map it: the sum is one copy.
        held = sum(proportional for _, proportional, _ in mapped)
        assert held == pytest.approx(3 * PAGE_BYTES, rel=0.01)
        assert all(resident >= 3 * 200_000 for resident, _, _ in mapped)
        assert {rights for _, _, rights in mapped} == {"r--s"}


def _mapped_segments(pid: int) -> tuple[int, int, str]:
    """Resident and proportional bytes of a process's mappings of segments, and the rights of the last of them."""
    sizes = {"Rss": 0, "Pss": 0}
    rights, in_segment = "", False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", name):
            in_segment = re.fullmatch(r".*/[0-9a-f]{16}-\d{5}-\d+", values[-1]) is not None
            rights = values[0] if in_segment else rights
        elif in_segment and name.rstrip(":") in sizes:
            sizes[name.rstrip(":")] += int(values[0]) << 10
    return sizes["Rss"], sizes["Pss"], rights


# Each says "ready" in the state in which it is then killed, closed or left.
STATES = {
    "connected": """
from pathlib import Path
from tiermem.rpc.descriptors import DescriptorClient
connection = DescriptorClient(sys.argv[2].removeprefix("unix:") + ".fd")
""",
    "attached": """
client = tiermem.connect(sys.argv[2])
client.status()
""",
    "opened": """
from tiermem.rpc import messages
client = tiermem.connect(sys.argv[2])
client._call("Open", messages.OpenRequest(sys.argv[1]))
""",
    "reading": """
model = tiermem.open(sys.argv[1], address=sys.argv[2])
arrays = dict(model)
""",
}


@pytest.mark.parametrize("state", STATES)
def test_killed_client_leaves_no_lease(daemon: Daemon, weights: Weights, state: str) -> None:
    with Child.script(STATES[state] + "say('ready'); pause()", weights.path, daemon.address) as child:
        assert child.line() == "ready"
        assert daemon.leases() == (state in ("opened", "reading"))
        child.kill9()
    eventually(lambda: daemon.leases() == 0, "the dead client's leases ended")
    assert daemon.serves(weights)


@pytest.mark.root
def test_client_killed_while_it_waits_leaves_no_lease(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    gate = disk.gate(weights.files[2].name, 100_000)
    with Child.script("tiermem.open(sys.argv[1], address=sys.argv[2]).wait()", disk.path, daemon.address) as child:
        gate.await_reached()
        assert daemon.leases() == 1
        child.kill9()
    eventually(lambda: daemon.leases() == 0, "the dead client's leases ended")
    gate.open()
    # What it began is finished: the next client finds it.
    eventually(lambda: daemon.model("disk")["state"] == "resident", "the load ended")
    assert daemon.serves(weights.at(disk.path))


@pytest.mark.root
def test_client_killed_while_it_opens_leaves_no_lease(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    gate = disk.gate(weights.files[0].name, 10)  # in the header, which is read before there is a lease
    with Child.script("tiermem.open(sys.argv[1], address=sys.argv[2])", disk.path, daemon.address) as child:
        gate.await_reached()
        connected = daemon.open_files()
        child.kill9()
    eventually(lambda: daemon.open_files() < connected, "the daemon noticed")
    gate.open()
    assert daemon.serves(weights.at(disk.path))
    eventually(lambda: daemon.leases() == 0, "the dead client got no lease")


@pytest.mark.root
def test_session_that_ended_while_it_opened_gets_no_lease(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    """Its calls live on: only the connection that the session is bound to has gone."""
    gate = disk.gate(weights.files[0].name, 10)
    with daemon.client() as client, ThreadPoolExecutor(1) as thread:
        opening = thread.submit(client.open, disk.path)
        gate.await_reached()
        connected = daemon.open_files()
        client._live().descriptors._connection.shutdown(socket.SHUT_RDWR)
        eventually(lambda: daemon.open_files() < connected, "the daemon noticed")
        gate.open()
        with pytest.raises(Refused, match=f"process {os.getpid()} left while it opened"):
            opening.result(10)
    assert daemon.leases() == 0


@pytest.mark.root
def test_open_that_was_given_up_leaves_no_lease(daemon: Daemon, weights: Weights, disk: FaultyDisk) -> None:
    gate = disk.gate(weights.files[0].name, 10)
    with daemon.client() as client:
        with pytest.raises(DeadlineExceeded):
            client._live().channel.call("Open", messages.OpenRequest(str(disk.path)), timeout_s=0.1)
        gate.await_reached()
        gate.open()
        assert daemon.serves(weights.at(disk.path))
        eventually(lambda: daemon.leases() == 0, "the lease that nobody knows of ended")
        assert client.remove("disk") == 3 * PAGE_BYTES


@pytest.mark.parametrize(
    "end", ["arrays.clear(); del model", "model.close()", "model._holder._client.close()", "sys.exit()"]
)
def test_lease_ends_with_its_use(daemon: Daemon, weights: Weights, end: str) -> None:
    script = STATES["reading"] + f"say('ready'); pause(); {end}; say('done'); pause()"
    with Child.script(script, weights.path, daemon.address) as child:
        assert child.line() == "ready"
        assert daemon.leases() == 1
        child.say()
        assert child.exit_code() == 0 if "exit" in end else child.line() == "done"
        eventually(lambda: daemon.leases() == 0, "the lease ended")


def test_arrays_keep_the_lease_of_a_model_that_is_gone(daemon: Daemon, weights: Weights) -> None:
    script = (
        "array = tiermem.open(sys.argv[1], address=sys.argv[2])[sys.argv[3]]; say('ready'); pause(); say(len(array))"
    )
    with Child.script(script, weights.path, daemon.address, layer(1)) as child:
        assert child.line() == "ready"
        assert daemon.leases() == 1
        child.say()
        assert child.line() == "200000"
    eventually(lambda: daemon.leases() == 0, "the lease ended")


def test_leased_model_is_neither_evicted_nor_removed(daemon: Daemon, weights: Weights, tmp_path: Path) -> None:
    others = write_weights(tmp_path / "others", layers=6)
    with Child.script(READER, weights.path, daemon.address) as reader, daemon.client() as client:
        assert reader.line() == weights.digest
        daemon.settle()
        for attempt in (client.evict, client.remove):
            with pytest.raises(Refused, match=rf"leased by process {reader.pid}; close it there first") as caught:
                attempt(weights.name)
            assert caught.value.exit_code == 5
        # 3 + 6 pages do not fit in 8, and pressure takes nothing from a reader either.
        with pytest.raises(CapacityError, match=r"2\.0 MiB|10\.0 MiB") as full:
            client.load(others.path)
        assert full.value.exit_code == 5
        assert daemon.model(weights.name)["state"] == "resident"
        reader.say()
        assert reader.exit_code() == 0
        eventually(lambda: daemon.leases() == 0, "the lease ended")
        client.load(others.path)
        assert daemon.model(weights.name)["resident_bytes"] < 3 * PAGE_BYTES
        assert daemon.serves(others)


def test_models_have_more_segments_than_files_may_be_open(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "many", layers=70, layer_bytes=4096)
    with Daemon(tier="dram=160MiB", prefix=("prlimit", "--nofile=64:4096")) as daemon:
        assert daemon.serves(weights)


def test_client_closed_while_its_daemon_is_away_announces_nothing(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model")
    with Daemon() as daemon:
        client = daemon.client()
        array = client.open(weights.path)[layer(0)]
        daemon.settle()
        daemon.kill9()
        client.close()
        daemon.start()
        assert array.tobytes() == weights.tensors[layer(0)]
        with pytest.raises(Closed):
            client.status()
        assert [found["state"] for found in daemon.settle()] == ["resident"]
        assert daemon.leases() == 0
