"""Copies on a device of torch, `cpu` standing in for one: a pool sees them, orders them, and gets them back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.test_replicas import COPY, DROP
from tests.integration.weights import Weights, write_weights
from tiermem.client import Client
from tiermem.types import PAGE_BYTES

pytest.importorskip("torch")

LAYERS = 4
TIER = "hbm@cpu"

OWNER = """
import torch
model = tiermem.open(sys.argv[1], address=sys.argv[2])
with model.{} as placed:
    say("placed")
    while (word := pause()) != "end":
        if word == "compare":
            for name, tensor in placed.items():
                assert bytes(tensor.numpy()) == bytes(model.raw(name)), name
        elif word == "slow":
            from tiermem.device.residency import Residency
            Residency.hold = lambda *_: (say("copying"), time.sleep(60))
        say(word)
say("closed")
pause()
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
    with Daemon("--policy-budget", "5s", "--policy", "hold", tier="hbm=64MiB@cpu,dram=64MiB") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def owner(daemon: Daemon, weights: Weights, call: str) -> Child:
    child = Child.script(OWNER.format(call), weights.path, daemon.address)
    assert child.line(60) == "placed"
    return child


def held(client: Client) -> int:
    """Pages on the device, as its tier counts them."""
    return int(client.status()["tiers"][0]["used_bytes"]) // PAGE_BYTES


def test_a_model_on_a_device_is_shown_until_it_is_closed(daemon: Daemon, client: Client, weights: Weights) -> None:
    with owner(daemon, weights, 'to("cpu")') as child:
        eventually(lambda: held(client) == LAYERS, "all of it is there")
        status = client.status()
        (model,), (device,) = status["models"], status["devices"]
        assert model["replicas"] == {TIER: dict.fromkeys(model["residency"], PAGE_BYTES)}
        assert (device["pid"], device["tier"], device["held_bytes"]) == (child.pid, TIER, LAYERS * PAGE_BYTES)
        assert LAYERS * 200_000 <= device["budget_bytes"] <= device["capacity_bytes"]
        child.say("end")
        assert child.line() == "closed"
        eventually(lambda: client.status()["devices"] == () and held(client) == 0, "all of it is given back")


def test_a_policy_orders_copies_and_drops(daemon: Daemon, client: Client, weights: Weights, policy: Path) -> None:
    with owner(daemon, weights, 'stream("cpu", budget="16MiB")') as child:
        eventually(lambda: len(client.status()["devices"]) == 1, "the device is known")
        assert held(client) == 0
        client.set_policy(str(policy))
        eventually(lambda: held(client) == LAYERS, "the policy's copies are made")
        policy.write_text(DROP)
        client.set_policy(str(policy))
        eventually(lambda: held(client) == 0, "and given up again")
        client.set_policy("hold")
        child.say("compare")
        assert child.line() == "compare"
        eventually(lambda: held(client) == LAYERS, "what the process asked for is there")
        policy.write_text(DROP)
        client.set_policy(str(policy))
        eventually(lambda: client.policy_log()[0].outcome == "in use", "what it holds stays")
        assert held(client) == LAYERS
    outcomes = {(entry.outcome, entry.source) for entry in client.policy_log()}
    assert outcomes >= {("copied", "dram"), ("dropped", TIER), ("in use", TIER)}


def test_a_process_that_is_killed_while_its_agent_copies_gives_all_of_it_back(
    daemon: Daemon, client: Client, weights: Weights, policy: Path
) -> None:
    with owner(daemon, weights, 'stream("cpu", budget="16MiB")') as child:
        eventually(lambda: len(client.status()["devices"]) == 1, "the device is known")
        child.say("slow")
        assert child.line() == "slow"
        client.set_policy(str(policy))
        assert child.line() == "copying"
        assert held(client) == 1, "room is kept for it"
        child.kill9()
        eventually(lambda: client.status()["devices"] == () and held(client) == 0, "nothing of it is left")
    assert client.policy_log()[-1].outcome == "not copied"
    assert daemon.serves(weights)
