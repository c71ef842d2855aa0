"""Reports of copies that no agent of ours would send: refused, and the daemon counts what it counted before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.test_rpc import Caller
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem.client import Client
from tiermem.errors import ProtocolError, Refused, TiermemError
from tiermem.rpc.messages import SESSION_KEY
from tiermem.rpc.methods import METHODS
from tiermem.types import PAGE_BYTES

PAGES = 2


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon("--policy", "hold", tier="hbm=64MiB@npu:0,dram=64MiB") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def weights(daemon: Daemon, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    written = write_weights(tmp_path_factory.mktemp("weights") / "model", layers=PAGES)
    yield written
    assert daemon.serves(written)
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    status = client.status()
    assert (status["devices"], status["tiers"][0]["used_bytes"]) == ((), 0), "nothing outlives its lease"
    for model in status["models"]:
        client.remove(model["name"])


@pytest.fixture
def caller(daemon: Daemon, weights: Weights) -> Iterator[Caller]:
    with Caller(daemon) as caller:
        yield caller


@pytest.fixture
def lease(caller: Caller, weights: Weights) -> str:
    opened = str(caller.call("Open", path=str(weights.path))["lease_id"])
    caller.call("Wait", lease_id=opened)
    return opened


def report(lease: str, **fields: object) -> dict[str, object]:
    """One that is taken as it is."""
    good = {"carrier": 0, "device": "npu:0", "budget_bytes": 1 << 20, "capacity_bytes": 1 << 30, "pages": b"\1"}
    return {"lease_id": lease} | good | fields


def used(client: Client) -> int:
    return int(client.status()["tiers"][0]["used_bytes"])


def numbers(*pages: int) -> bytes:
    return np.array(pages, "<i4").tobytes()


def test_what_a_good_report_does(caller: Caller, lease: str, client: Client) -> None:
    assert caller.call("Replicas", **report(lease, copied=numbers(0))) == {}
    assert used(client) == PAGE_BYTES
    assert client.status("model")["models"][0]["replicas"] == {"hbm@npu:0": {"model.layers.0": PAGE_BYTES}}
    assert caller.call("Replicas", **report(lease, pages=b"\0", gone=True)) == {}
    assert (used(client), client.status()["devices"]) == (0, ())


BAD: dict[str, dict[str, object]] = {
    "no bits": {"pages": b""},
    "too many bits": {"pages": b"\1\0"},
    "a page beyond": {"pages": b"\5"},
    "pages as text": {"pages": "1"},
    "gone, with a page": {"gone": True},
    "gone, in a word": {"gone": "yes"},
    "a negative budget": {"budget_bytes": -1},
    "a budget beyond all memory": {"budget_bytes": 1 << 63},
    "a negative capacity": {"capacity_bytes": -(1 << 63)},
    "half a byte": {"capacity_bytes": 0.5},
    "a negative carrier": {"carrier": -1},
    "a carrier without a number": {"carrier": None},
    "no device": {"device": ""},
    "a device that is a path": {"device": "/dev/davinci0"},
    "a long device": {"device": "n" * 100_000},
    "a device of control characters": {"device": "npu:0\n"},
    "another name of the device": {"device": "npu"},
    "the device of another carrier": {"device": "npu:1"},
    "a page twice": {"copied": numbers(1, 1)},
    "pages backwards": {"copied": numbers(1, 0)},
    "a copied page beyond": {"copied": numbers(PAGES)},
    "a negative page": {"copied": numbers(-1)},
    "a page far beyond": {"copied": numbers((1 << 31) - 1)},
    "from end to end": {"copied": numbers(-(1 << 31), (1 << 31) - 1)},
    "half a number": {"copied": b"\0\0\0"},
    "an order never given": {"results": [{"order": 1}]},
    "order 0": {"results": [{"order": 0}]},
    "a negative order": {"results": [{"order": -1, "error": "no"}]},
    "a result without an order": {"results": [{"error": "no"}]},
    "a stranger field": {"heat": 1.0},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_a_report_that_cannot_be_changes_nothing(
    caller: Caller, lease: str, client: Client, fields: dict[str, object]
) -> None:
    caller.call("Replicas", **report(lease))
    before = client.status()["devices"]
    with pytest.raises(ProtocolError):
        caller.call("Replicas", **report(lease, **{"pages": b"\3"} | fields))
    assert (used(client), client.status()["devices"]) == (PAGE_BYTES, before)


def test_the_lease_of_another_client(daemon: Daemon, caller: Caller, lease: str, client: Client) -> None:
    with Caller(daemon) as other:
        for foreign in (lease, "", "0" * 16, "\0", "x" * 1000):
            for method, fields in (("Replicas", report(foreign)), ("Digests", {"lease_id": foreign})):
                with pytest.raises(Refused, match="not held by this client"):
                    other.call(method, **fields)
    assert used(client) == 0
    assert len(caller.call("Digests", lease_id=lease)["digests"]) == 32 * PAGES


def test_many_carriers_of_one_lease(caller: Caller, lease: str, client: Client) -> None:
    for number in range(1024):
        caller.call("Replicas", **report(lease, carrier=number))
    with pytest.raises(ProtocolError, match="has 1024 carriers already"):
        caller.call("Replicas", **report(lease, carrier=1024))
    assert used(client) == 1024 * PAGE_BYTES, "a client may say that it has more than fits"
    caller.call("Release", lease_id=lease)
    assert used(client) == 0


def test_copies_need_a_session(daemon: Daemon, lease: str) -> None:
    with Caller(daemon) as caller:
        for token in (None, b"", bytes(16)):
            caller.token = token
            for method, fields in (("Replicas", report(lease)), ("Digests", {"lease_id": lease})):
                with pytest.raises(TiermemError, match="session token"):
                    caller.call(method, **fields)


COPY_ALL = """
import numpy as np
from tiermem.policy import moves
class CopyAll:
    period_s = 0.05
    def plan(self, view):
        pages = view.pages
        return moves(view, np.flatnonzero(pages.leased & (pages.replicas == 0) & (pages.tier == 1)), 0, "all", "copy")
"""


def test_a_client_that_attaches_and_never_reads_gets_few_orders(
    daemon: Daemon, caller: Caller, lease: str, client: Client, tmp_path: Path
) -> None:
    attach: Any = caller._channel.unary_stream(METHODS["Attach"].path)
    stream = attach(msgpack.packb({"protocol": 1, "pid": 1}), metadata=((SESSION_KEY, caller.token),))
    assert msgpack.unpackb(next(stream))["kind"] == "attached"
    mine = tmp_path / "mine.py"
    mine.write_text(COPY_ALL)
    caller.call("Replicas", **report(lease, pages=b"\0"))
    try:
        client.set_policy(str(mine))
        eventually(lambda: client.status()["devices"][0]["orders"] == 1, "an order was given")
        for error in ("\0", "x" * 100_000, ""):
            with pytest.raises(ProtocolError, match="was never given"):
                caller.call("Replicas", **report(lease, results=[{"order": 1 << 40, "error": error}]))
        assert client.status()["devices"][0]["orders"] == 1
    finally:
        client.set_policy("hold")
        stream.cancel()
    eventually(lambda: client.status()["devices"] == (), "it took its orders along")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_reports(caller: Caller, lease: str, client: Client, data: st.DataObject) -> None:
    junk = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.binary(max_size=9)
    fields: dict[str, Any] = report(lease, copied=numbers(0), results=[{"order": 1, "error": ""}], gone=False)
    for name in data.draw(st.sets(st.sampled_from(sorted(fields)), max_size=3)):
        fields[name] = data.draw(junk | st.lists(junk, max_size=3))
    with suppress(TiermemError):
        caller.call("Replicas", **fields)
    held = sum(device["held_bytes"] for device in client.status()["devices"] if device["tier"])
    assert used(client) == held
