"""Reports and watches that no agent of ours would send: refused or void, and the daemon's heat is as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.frames import Watching, frames_of
from tests.hostile.test_rpc import Caller
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tiermem.client import Client
from tiermem.errors import ConfigError, ProtocolError, TiermemError
from tiermem.rpc.codec import MAX_MESSAGE_BYTES

PAGES = 2
ADDRESS = 0x7F00_0000_0000


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon("--sampler", "present") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def weights(daemon: Daemon, client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weights]:
    written = write_weights(tmp_path_factory.mktemp("weights") / "model", layers=PAGES)
    yield written
    assert daemon.serves(written)
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    for model in client.status()["models"]:
        client.remove(model["name"])


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def caller(daemon: Daemon, weights: Weights) -> Iterator[Caller]:
    with Caller(daemon) as caller:
        yield caller


@pytest.fixture
def lease(caller: Caller, weights: Weights) -> str:
    return str(caller.call("Open", path=str(weights.path))["lease_id"])


def window(lease: str, **fields: object) -> dict[str, object]:
    """One that is taken as it is."""
    now = time.monotonic()
    page = {"pages": np.array([0], "<i4").tobytes(), "touched": b"\1"}
    return {"lease_id": lease, "begin_s": now - 0.1, "end_s": now} | page | fields


def numbers(*pages: int) -> bytes:
    return np.array(pages, "<i4").tobytes()


def known(client: Client) -> list[bool]:
    found: list[bool] = client.heat("model").columns.known.tolist()
    return found


def test_what_a_good_report_does(caller: Caller, lease: str, client: Client) -> None:
    assert known(client) == [False] * PAGES
    assert caller.call("Report", rung="present", windows=[window(lease)]) == {}
    assert known(client) == [True, False]


WINDOWS: dict[str, dict[str, object]] = {
    "page beyond": {"pages": numbers(PAGES)},
    "negative page": {"pages": numbers(-1)},
    "descending pages": {"pages": numbers(1, 0)},
    "page twice": {"pages": numbers(1, 1)},
    "half a number": {"pages": numbers(0, 1)[:-1]},
    "no bits": {"touched": b""},
    "too many bits": {"touched": b"\1\1"},
    "bits of nothing": {"pages": b""},
    "future": {"end_s": time.monotonic() + 1e6},
    "ends before it begins": {"end_s": 1.0},
    "before the host": {"begin_s": -1e300},
    "NaN": {"end_s": float("nan")},
    "infinite": {"begin_s": float("-inf")},
    "no time": {"begin_s": None},
    "pages as text": {"pages": "0123"},
    "no lease": {"lease_id": None},
    "stranger field": {"heat": 1.0},
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_cannot_be_is_refused(caller: Caller, lease: str, client: Client, name: str) -> None:
    with pytest.raises(ProtocolError):
        caller.call("Report", rung="present", windows=[window(lease, **WINDOWS[name])])
    assert known(client) == [False] * PAGES


@pytest.mark.parametrize("rung", ["perf", "declared", "none", "nonsense", "", "PRESENT"])
def test_a_rung_that_is_not_a_clients_is_void(caller: Caller, lease: str, client: Client, rung: str) -> None:
    assert caller.call("Report", rung=rung, windows=[window(lease)], agent_s=1.0) == {}
    assert known(client) == [False] * PAGES
    assert set(client.status()["sampling"]["rungs"]) <= {"declared", "present"}


def test_windows_before_a_bad_one_count_and_those_behind_it_do_not(caller: Caller, lease: str, client: Client) -> None:
    good, bad, late = window(lease), window(lease, end_s=0.0), window(lease, pages=numbers(1))
    with pytest.raises(ProtocolError, match="is no past"):
        caller.call("Report", rung="present", windows=[good, bad, late])
    assert known(client) == [True, False]


def test_leases_of_others_and_leases_that_ended_are_void(
    daemon: Daemon, caller: Caller, lease: str, client: Client
) -> None:
    def told(by: Caller, of: str) -> None:
        mapped = {"lease_id": of, "address": ADDRESS, "since_s": 1.0}
        assert by.call("Report", rung="present", mapped=[mapped], windows=[window(of)],
                       untrackable=[{"lease_id": of, "pages": 1}]) == {}  # fmt: skip

    with Watching(client.watch()) as watching, Caller(daemon) as other:
        told(other, lease)
        told(caller, "no such lease")
        caller.call("Release", lease_id=lease)
        told(caller, lease)
        watching.until("release", lease=lease)
        assert watching.of("map") == watching.of("bits") == []
    assert known(client) == [False] * PAGES
    assert client.status()["sampling"]["clients"] == ()


MAPPED: dict[str, dict[str, object]] = {
    "null": {"address": 0},
    "negative": {"address": -(2 << 20)},
    "end of all": {"address": (1 << 64) - (2 << 20)},
    "kernel": {"address": 0xFFFF_8000_0000_0000},
    "before the host": {"since_s": -1.0},
    "NaN": {"since_s": float("nan")},
}


@pytest.mark.parametrize("name", MAPPED)
def test_an_address_that_no_process_has_is_refused(caller: Caller, lease: str, client: Client, name: str) -> None:
    with Watching(client.watch()) as watching:
        mapped = {"lease_id": lease, "address": ADDRESS, "since_s": 1.0}
        with pytest.raises(ProtocolError):
            caller.call("Report", rung="present", mapped=[mapped | MAPPED[name]])
        assert caller.call("Report", rung="present", mapped=[mapped, mapped]) == {}
        watching.until("map", lease=lease)
        assert [frame["address"] for frame in watching.of("map")] == [ADDRESS]


def test_a_mapping_in_the_future_is_one_of_now(caller: Caller, lease: str, client: Client) -> None:
    with Watching(client.watch()) as watching:
        mapped = {"lease_id": lease, "address": ADDRESS, "since_s": 1e300}
        assert caller.call("Report", rung="off", mapped=[mapped]) == {}
        watching.until("map", lease=lease)
        assert watching.of("map")[0]["time_s"] <= time.monotonic()


@pytest.mark.parametrize("name", ["agent_s", "fault_s", "client_s"])
@pytest.mark.parametrize("cost_s", [-1.0, 1e300, float("inf")])
def test_a_cost_that_cannot_be_is_refused(caller: Caller, lease: str, client: Client, name: str, cost_s: float) -> None:
    before = client.status()["sampling"]["rungs"].get("present")
    with pytest.raises(ProtocolError):
        caller.call("Report", rung="present", **{name: cost_s})
    assert client.status()["sampling"]["rungs"].get("present") == before


def test_untrackable_pages_and_refusals_cannot_outgrow_a_status(caller: Caller, lease: str, client: Client) -> None:
    for pages in (-1, PAGES + 1, 1 << 63):
        with pytest.raises(ProtocolError):
            caller.call("Report", rung="present", untrackable=[{"lease_id": lease, "pages": pages}])
    caller.call("Report", rung="present", refused="\N{SNOWMAN}" * 10_000_000)
    (found,) = client.status()["sampling"]["clients"]
    assert (found["untrackable_pages"], found["refused"]) == (0, "\N{SNOWMAN}" * 500)


def test_a_report_may_be_as_large_as_a_message_and_no_larger(caller: Caller, lease: str, client: Client) -> None:
    body = msgpack.packb({"rung": "present", "windows": [window(lease, pages=bytes(MAX_MESSAGE_BYTES - 4096))]})
    with pytest.raises(ProtocolError, match="16776192 pages with 1 bytes of bits"):
        caller.send("Report", body)
    with pytest.raises(Exception, match=r"(?i)larger than max|RESOURCE_EXHAUSTED"):
        caller.send("Report", msgpack.packb({"rung": "present", "refused": "x" * (MAX_MESSAGE_BYTES + 1)}))
    assert known(client) == [False] * PAGES


def test_many_windows_at_once(caller: Caller, lease: str, client: Client) -> None:
    caller.call("Report", rung="present", windows=[window(lease)] * 5_000)
    assert client.heat("model").columns.sampled.tolist() == [5_000, 0]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
    | st.text(max_size=8) | st.binary(max_size=16),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_report_is_answered(caller: Caller, lease: str, client: Client, data: st.DataObject) -> None:
    def part(good: dict[str, object]) -> Any:
        """Now and then something else in place of a field."""
        changed = data.draw(st.dictionaries(st.sampled_from([*good, "more"]), ANY, max_size=2))
        return good | changed

    body = part({
        "rung": data.draw(st.sampled_from(["present", "accessed", "perf"])),
        "mapped": [part({"lease_id": lease, "address": ADDRESS, "since_s": 1.0})],
        "windows": [part(window(lease))], "untrackable": [part({"lease_id": lease, "pages": 1})], "agent_s": 0.1,
    })  # fmt: skip
    with suppress(ProtocolError):
        caller.call("Report", **body)
    client.status()
    assert len(known(client)) == PAGES


@pytest.mark.parametrize(
    "fields",
    [{"epoch_s": 0}, {"epoch_s": -1}, {"epoch_s": 1e9}, {"budget": 0}, {"budget": -0.1}, {"budget": 2},
     {"epoch_s": float("nan")}, {"budget": float("inf")}, {"epoch_s": "1s"}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_a_wish_that_cannot_be(caller: Caller, fields: dict[str, object]) -> None:
    with pytest.raises((ConfigError, ProtocolError)):
        caller.call("Watch", **fields)


def test_watching_needs_a_session(daemon: Daemon) -> None:
    with Caller(daemon) as caller:
        for token in (None, b"", bytes(16)):
            caller.token = token
            for method, fields in (("Watch", {}), ("Report", {"rung": "present"}), ("Heat", {"name": "model"})):
                with pytest.raises(TiermemError, match="session token"):
                    caller.call(method, **fields)


def test_watchers_that_leave_at_once_leave_nothing(daemon: Daemon, client: Client, weights: Weights) -> None:
    before = daemon.open_files()
    for _ in range(50):
        client.watch(0.01, 1.0).cancel()
    stream = client.watch()
    with client.open(weights.path):
        told = frames_of(next(stream).frames)
    assert "model" in {frame["kind"] for frame in told}
    stream.cancel()
    deadline = time.monotonic() + 10
    while daemon.open_files() > before + 5 and time.monotonic() < deadline:  # it learns of it a moment later
        time.sleep(0.05)
    assert daemon.open_files() <= before + 5
