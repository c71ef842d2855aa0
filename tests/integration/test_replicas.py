"""Copies on devices, with a real daemon and real clients: orders reach who has the device, and the truth returns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.carrier import NumpyCarrier
from tests.integration.child import Child, eventually
from tests.integration.conftest import PoolMaker
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem.client import Client
from tiermem.types import PAGE_BYTES

LAYERS = 4
TIERS = "hbm=6MiB@npu:0,dram=64MiB"
"""Three pages fit on the device."""

COPY = """
import numpy as np
from tiermem.policy import moves
class Copy:
    period_s = 0.05
    def plan(self, view):
        pages, device = view.pages, view.tiers[0]
        rows = np.flatnonzero(pages.leased & (pages.replicas == 0) & (pages.tier == 1))
        return moves(view, rows[: device.free_bytes >> 21], device.id, "somebody reads it", "copy")
"""
DROP = """
import numpy as np
from tiermem.policy import Move
class Drop:
    period_s = 0.05
    def plan(self, view):
        return [Move(row, 1, 0, 1, "enough of it", "drop") for row in np.flatnonzero(view.pages.replicas)[:2].tolist()]
"""

OWNER = """
from tests.integration.carrier import NumpyCarrier
model = tiermem.open(sys.argv[1], address=sys.argv[2])
model.wait()
carrier = NumpyCarrier(model, *sys.argv[3:])
say("carries")
while (word := pause()) != "end":
    if word == "stop":
        carrier.go.clear()
        carrier.copying.clear()
    elif word == "copying":
        carrier.copying.wait(20)
    elif word == "close":
        carrier.link.close()
    assert all(data == bytes(model.raw(name)) for name, data in carrier.tensors.items())
    say(" ".join(sorted(carrier.tensors)))
"""


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return write_weights(tmp_path / "model", layers=LAYERS)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(COPY)
    return path


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon("--policy-budget", "5s", tier=TIERS) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def ask(child: Child, word: str) -> list[str]:
    """Names of the tensors that it has copied, once it has done what was said."""
    child.say(word)
    return child.line().split()


def copied(client: Client) -> list[str]:
    """Layers with a copy, as the pool has them."""
    replicas = client.status()["models"][0]["replicas"]
    assert all(nbytes == PAGE_BYTES for held in replicas.values() for nbytes in held.values())
    return sorted(replicas.get("hbm@npu:0", {}))


def used(client: Client) -> int:
    return int(client.status()["tiers"][0]["used_bytes"]) // PAGE_BYTES


def devices(client: Client) -> list[tuple[Any, ...]]:
    keys = ("device", "pid", "model", "tier", "held_bytes", "orders")
    return [tuple(device[key] for key in keys) for device in client.status()["devices"]]


def declared(client: Client) -> int:
    """Pages that somebody is known to have read because he said so."""
    return int(client.status()["sampling"]["rungs"]["declared"]["pages"])


def owner(daemon: Daemon, weights: Weights, *arguments: object) -> Child:
    child = Child.script(OWNER, weights.path, daemon.address, *arguments)
    assert child.line() == "carries"
    return child


def test_a_policys_copies_and_drops_reach_the_agent_and_come_back(
    daemon: Daemon, client: Client, weights: Weights, policy: Path
) -> None:
    with owner(daemon, weights) as child:
        eventually(lambda: len(devices(client)) == 1, "the carrier is known")
        assert (devices(client), copied(client)) == ([("npu:0", child.pid, "model", "hbm@npu:0", 0, 0)], [])
        before = declared(client)
        client.set_policy(str(policy))
        eventually(lambda: used(client) == 3, "three pages are copied")
        names = ask(child, "state")
        assert len(names) == 3, "the bytes are there, and right"
        assert copied(client) == [name.removesuffix(".weight") for name in names]
        assert devices(client)[0][4:] == (3 * PAGE_BYTES, 0)
        entries = client.policy_log("model")
        assert {(entry.source, entry.target, entry.reason, entry.outcome) for entry in entries} == {
            ("dram", "hbm@npu:0", "somebody reads it", "copied")
        }
        assert declared(client) == before + 3, "our own copies are accesses"
        policy.write_text(DROP)
        client.set_policy(str(policy))
        eventually(lambda: used(client) == 0, "all is given up")
        assert (ask(child, "state"), copied(client)) == ([], [])
        assert client.policy_log("model")[0].outcome == "dropped"
        assert client.policy_log("model")[0].reason == "enough of it"
        moved = client.status()["migration"]["moved_pages"]
        assert moved == {"dram->hbm@npu:0": 3, "hbm@npu:0->dram": 3}


def test_a_client_that_is_killed_while_it_copies_gives_all_of_it_back(
    daemon: Daemon, client: Client, weights: Weights, policy: Path
) -> None:
    with owner(daemon, weights) as child:
        ask(child, "stop")
        client.set_policy(str(policy))
        ask(child, "copying")
        eventually(lambda: devices(client)[0][5] == 1, "an order is under way")
        assert used(client) == 1, "room is kept for it"
        child.kill9()
        eventually(lambda: devices(client) == [] and used(client) == 0, "nothing of it is left")
    entry = client.policy_log("model")[-1]
    assert (entry.outcome, entry.reason) == (
        "not copied", f"somebody reads it; process {child.pid} closed the model, or ended")  # fmt: skip
    assert copied(client) == []
    with owner(daemon, weights) as child:
        eventually(lambda: used(client) == 3, "the next one is served")


def test_two_processes_on_one_device_are_both_told(daemon: Daemon, client: Client, weights: Weights) -> None:
    with owner(daemon, weights) as first, owner(daemon, weights) as second:
        eventually(lambda: len(devices(client)) == 2, "both are known")
        assert {device[1] for device in devices(client)} == {first.pid, second.pid}
        ask(first, "close")
        eventually(lambda: [device[1] for device in devices(client)] == [second.pid], "one left")


def test_a_device_that_the_pool_has_no_tier_for_is_shown(daemon: Daemon, client: Client, weights: Weights) -> None:
    with owner(daemon, weights, "cuda:0") as child:
        eventually(lambda: len(devices(client)) == 1, "the carrier is known")
        assert devices(client)[0][:4] == ("cuda:0", child.pid, "model", None)
        assert used(client) == 0


def test_the_next_daemon_hears_of_copies_that_were_made_before(weights: Weights, policy: Path) -> None:
    with Daemon("--policy", str(policy), "--policy-budget", "5s", tier=TIERS) as daemon:
        with daemon.client() as client, owner(daemon, weights) as child:
            eventually(lambda: used(client) == 3, "three pages are copied")
            daemon.settle()
            daemon.restart()
            eventually(lambda: used(client) == 3, "the next daemon knows of them", 20)
            assert devices(client)[0][:4] == ("npu:0", child.pid, "model", "hbm@npu:0")
            assert len(ask(child, "state")) == 3
            assert "copied" not in {entry.outcome for entry in client.policy_log()}, "nothing is copied again"
        with daemon.client() as client:
            eventually(lambda: used(client) == 0, "they ended with their client")


def test_a_tier_without_a_size_has_what_its_first_client_says(weights: Weights, policy: Path) -> None:
    options = ("--policy", str(policy), "--policy-budget", "5s")
    with Daemon(*options, tier="hbm@npu:0,dram=64MiB") as daemon, daemon.client() as client:
        assert client.status()["tiers"][0]["capacity_bytes"] == 0
        with owner(daemon, weights):
            eventually(lambda: used(client) == LAYERS, "everything is copied")
            assert client.status()["tiers"][0]["capacity_bytes"] == 1 << 30


def test_status_shows_devices_and_copies(
    daemon: Daemon, client: Client, weights: Weights, policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiermem import cli

    client.set_policy(str(policy))
    with owner(daemon, weights) as child:
        eventually(lambda: used(client) == 3, "three pages are copied")
        assert cli.main(["status", "--address", daemon.address, "model"]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["hbm@npu:0", "6.0", "MiB", "6.0", "MiB", "100%"] in rows
    assert ["npu:0", str(child.pid), "model", "6.0", "MiB", "512.0", "MiB", "0", "hbm@npu:0"] in rows
    assert any("dram, 2.0 MiB on hbm@npu:0" in line for line in text.splitlines())


def test_an_embedded_pool_gives_its_own_process_orders(embedded: PoolMaker, weights: Weights, policy: Path) -> None:
    pool = embedded(tier=TIERS, policy=str(policy), policy_budget="5s")
    with pool.open(weights.path) as model:
        model.wait()
        assert all(digest is not None and len(digest) == 32 for digest in model._holder.digests())
        carrier = NumpyCarrier(model)
        eventually(lambda: pool.status()["tiers"][0]["used_bytes"] == 3 * PAGE_BYTES, "three pages are copied")
        assert all(data == weights.tensors[name] for name, data in carrier.tensors.items())
        pool._pool.check()
        carrier.link.close()
        eventually(lambda: pool.status()["tiers"][0]["used_bytes"] == 0, "they are gone")
        pool._pool.check()


def test_memory_that_a_device_reads_by_itself_is_pinned_as_long_as_it_does(
    daemon: Daemon, client: Client, embedded: PoolMaker, weights: Weights
) -> None:
    pool = embedded(tier=TIERS)
    with pool.open(weights.path) as model, client.open(weights.path) as far:
        model.wait()
        carrier, remote = NumpyCarrier(model), NumpyCarrier(far)
        memory, record = pool._pool.memory, pool._pool.catalog.by_id(model._holder.model_id)
        assert record is not None
        eventually(lambda: len(pool.status()["devices"]) == 1, "it is known")
        assert not memory.pins.pages(record).any()
        for one, status in ((carrier, pool.status), (remote, client.status)):
            one.registered = True
            one.link.changed()
            eventually(lambda status=status: status()["devices"][0]["registered"], "it tells of it")
        assert memory.pins.pages(record).all()
        carrier.link.close()
        eventually(lambda: not memory.pins.pages(record).any(), "its pages may move again")


def test_spare_memory_is_of_the_first_tier_that_has_pages(
    embedded: PoolMaker, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = embedded(tier=TIERS, spare="16MiB")
    eventually(lambda: pool.status()["spare"]["ready_bytes"] == 16 << 20, "it is filled")
    stock, taken = pool._pool.spare.stock, list[int]()
    take = stock.take
    monkeypatch.setattr(stock, "take", lambda nbytes: taken.append(nbytes) or take(nbytes))
    pool.load(weights.path)
    assert sum(taken) == LAYERS * PAGE_BYTES, "what is loaded takes the place of what was spare"


def test_a_pool_closes_while_a_copy_is_under_way(embedded: PoolMaker, weights: Weights, policy: Path) -> None:
    pool = embedded(tier=TIERS, policy=str(policy), policy_budget="5s")
    model = pool.open(weights.path)
    model.wait()
    orders = list[object]()
    pool._session.give = orders.append  # an agent that has ended carries nothing out
    carrier = NumpyCarrier(model)
    eventually(lambda: bool(orders), "an order is under way")
    begin_s = time.monotonic()
    pool.close()
    assert time.monotonic() - begin_s < 10
    del carrier


def test_a_closed_model_leaves_no_carrier(daemon: Daemon, client: Client, weights: Weights) -> None:
    model = client.open(weights.path)
    model.wait()
    carrier = NumpyCarrier(model)
    carrier.copy(0, range(0, 1))
    eventually(lambda: used(client) == 1, "it is told")
    model.close()
    eventually(lambda: used(client) == 0, "it went with the lease")
    assert client._carrying._known == {}
    carrier.link.changed()
    carrier.link.close()
    client._agent.settle()
    assert client.status()["devices"] == ()


def test_a_client_asks_for_digests(daemon: Daemon, client: Client, weights: Weights) -> None:
    from blake3 import blake3

    with client.open(weights.path) as model:
        model.wait()
        wanted = [blake3(weights.tensors[tensor.name]).digest() for tensor in model.manifest.tensors]
        assert model._holder.digests() == wanted
