"""What a daemon knows of the use of its models: what real clients touch, until they go, however they go."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.frames import Watching, frames_of
from tests.hostile.checkpoints import entry, header_text, write_file
from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.reader import reader
from tests.integration.weights import Weights, write_weights
from tests.unit.test_metrics import scrape
from tiermem.client import Client
from tiermem.errors import ConfigError, ModelNotFound, ProtocolError, TensorNotFound
from tiermem.heat import HeatColumns
from tiermem.model import Model
from tiermem.observations import Rung
from tiermem.rpc import messages as m
from tiermem.rpc.channel import Channel, Stream
from tiermem.rpc.descriptors import DescriptorClient
from tiermem.types import PAGE_BYTES

LAYERS = 6
EAGER = ("--sampler", "present", "--sample-epoch", "20ms", "--sample-budget", "100%")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def daemon(port: int) -> Iterator[Daemon]:
    with Daemon(*EAGER, "--metrics-port", str(port), tier="dram=128MiB") as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


@pytest.fixture
def weights(daemon: Daemon, client: Client, tmp_path: Path) -> Iterator[Weights]:
    yield write_weights(tmp_path / tmp_path.name, layers=LAYERS)
    eventually(lambda: daemon.leases() == 0, "the test's leases ended")
    for model in client.status()["models"]:
        client.remove(model["name"])


def columns(client: Client, name: str) -> HeatColumns:
    return client.heat(name).columns


def all_known(client: Client, name: str) -> bool:
    return bool(columns(client, name).known.all())


def seen(client: Client, pid: int) -> dict[str, Any] | None:
    """What the daemon says of a process that is its client."""
    found = [entry for entry in client.status()["sampling"]["clients"] if entry["pid"] == pid]
    return found[0] if found else None


def sleeps(child: Child) -> bool:
    """Whether a reader's agent has nothing to do until it gets an order."""
    child.say("pause_s")
    return child.line() == "None"


def test_pages_that_clients_touch_are_hot_and_all_others_are_cold(
    daemon: Daemon, client: Client, weights: Weights, tmp_path: Path
) -> None:
    other = write_weights(tmp_path / "other", layers=LAYERS)
    with ExitStack() as stack:
        first = stack.enter_context(reader(weights.path, daemon.address, 0, 3))
        second = stack.enter_context(reader(other.path, daemon.address, 5))
        for weight in (weights, other):
            eventually(lambda name=weight.name: all_known(client, name), "all pages were sampled")  # type: ignore[misc]
            eventually(lambda name=weight.name: (columns(client, name).rate > 0).any(), "touches were seen")  # type: ignore[misc]
        eventually(lambda: (columns(client, weights.name).rate > 0).sum() == 2, "both layers were seen")
        heat = client.heat(weights.name)
        assert [(layer, bool(rows.rate[0] > 0)) for layer, rows in heat.by_layer()] == [
            (f"model.layers.{i}", i in (0, 3)) for i in range(LAYERS)
        ]
        assert set(heat.columns.rung.tolist()) == {Rung.PRESENT}
        assert (columns(client, "other").rate > 0).tolist() == [False] * 5 + [True]
        status = client.status()
        pids = {entry["pid"] for entry in status["sampling"]["clients"]}
        assert pids == {first.pid, second.pid}
        cost = status["sampling"]["rungs"]["present"]
        assert 0 < cost["touched"] < cost["pages"]
        assert min(cost["sampler_s"], cost["client_s"]) > 0
        assert {model["name"]: model["heat"]["touched_pages"] for model in status["models"]} == {
            weights.name: 2, "other": 1,
        }  # fmt: skip
        for child in (first, second):
            child.say("close")
            eventually(lambda pid=child.pid: seen(client, pid) is None, "the closed client is gone")  # type: ignore[misc]
            assert child.alive
    assert all_known(client, weights.name), "what was learnt outlives who taught it"


def test_heat_of_no_model(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        client.heat("nothing")


def test_a_client_that_is_killed_leaves_its_heat_and_nothing_else(
    daemon: Daemon, client: Client, weights: Weights
) -> None:
    with Watching(client.watch()) as watching, reader(weights.path, daemon.address, 1) as child:
        watching.until("bits", pid=child.pid)
        child.kill9()
        watching.until("unmap", pid=child.pid)
        watching.until("release", pid=child.pid)
        eventually(lambda: seen(client, child.pid) is None, "the killed client is gone")
        known = columns(client, weights.name).known.sum()
        assert known > 0
        count = len(watching.of("bits"))
        (mapped,) = watching.of("map", pid=child.pid)
        assert (mapped["pages"], mapped["address"] % (2 << 20)) == (LAYERS, 0)
        with reader(weights.path, daemon.address, 2) as next_one:
            watching.until("bits", pid=next_one.pid)
        assert len(watching.of("bits")) > count


def test_a_client_that_becomes_another_program_is_no_client(daemon: Daemon, client: Client, weights: Weights) -> None:
    with Watching(client.watch()) as watching, reader(weights.path, daemon.address, 1) as child:
        watching.until("map", pid=child.pid)
        child.say("exec")
        assert child.line() == "another program"
        watching.until("release", pid=child.pid)
        assert [frame["kind"] for frame in watching.frames if frame["kind"] in ("unmap", "release")] == [
            "unmap",
            "release",
        ]
        eventually(lambda: seen(client, child.pid) is None, "its session ended")
        assert child.alive


def test_copy_on_write_is_refused_by_name_and_its_address_known(
    daemon: Daemon, client: Client, weights: Weights
) -> None:
    with Watching(client.watch()) as watching, reader(weights.path, daemon.address, 0, writable=True) as child:
        watching.until("map", pid=child.pid)
        eventually(lambda: (seen(client, child.pid) or {}).get("refused"), "the refusal is told")  # type: ignore[arg-type,return-value]
        facts = seen(client, child.pid)
        assert facts is not None
        assert "writable=False" in facts["refused"]
        assert facts["untrackable_pages"] == LAYERS
        with reader(weights.path, daemon.address, 1) as sampled:
            watching.until("bits", count=3, pid=sampled.pid)
        assert watching.of("bits", pid=child.pid) == []
        assert sleeps(child)


@pytest.mark.parametrize("sampler", ["off", "declared"])
def test_where_nobody_shall_look_agents_sleep(tmp_path: Path, sampler: str) -> None:
    weights = write_weights(tmp_path / "model", layers=LAYERS)
    with (
        Daemon("--sampler", sampler) as daemon,
        daemon.client() as client,
        Watching(client.watch(0.01, 1.0)) as watching,
    ):
        with reader(weights.path, daemon.address, 0) as child:
            watching.until("map", pid=child.pid)
            eventually(lambda: sleeps(child), "its agent waits for orders alone")
            status = client.status()
            assert status["sampling"]["rung"] == {"off": "none", "declared": "declared"}[sampler]
            assert set(status["sampling"]["rungs"]) == {"declared"}
        assert watching.of("bits") == []
        assert not columns(client, "model").known.any()
        assert set(columns(client, "model").rung.tolist()) == {Rung.DECLARED}


def test_the_next_daemon_learns_where_models_are_mapped_and_samples_on(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model", layers=LAYERS)
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(*EAGER, tier="dram=64MiB"))
        shared = stack.enter_context(reader(weights.path, daemon.address, 4))
        private = stack.enter_context(reader(weights.path, daemon.address, 4, writable=True))
        with daemon.client() as client:
            eventually(lambda: all_known(client, "model"), "the first daemon knows")
        daemon.settle()
        daemon.restart()
        with daemon.client() as client, Watching(client.watch()) as watching:
            for child in (shared, private):
                watching.until("map", pid=child.pid, pages=LAYERS)
            watching.until("bits", count=3, pid=shared.pid)
            eventually(lambda: all_known(client, "model"), "the second daemon knows")
            eventually(lambda: (columns(client, "model").rate > 0).tolist() == [False] * 4 + [True, False], "and what")
            eventually(lambda: "writable=False" in (seen(client, private.pid) or {}).get("refused", ""), "and what not")
            assert (seen(client, private.pid) or {})["untrackable_pages"] == LAYERS


def test_a_watcher_is_told_the_state_first(daemon: Daemon, client: Client, weights: Weights) -> None:
    with reader(weights.path, daemon.address, 1) as child:
        eventually(lambda: (columns(client, weights.name).rate > 0).any(), "it is mapped and seen")
        stream = client.watch()
        told = frames_of(next(stream).frames)
        assert [frame["kind"] for frame in told[:3]] == ["model", "open", "map"]
        assert {frame["pid"] for frame in told[1:3]} == {child.pid}
        assert told[1]["lease"] == told[2]["lease"]
        with Watching(stream) as watching:
            watching.until("bits", pid=child.pid)


@contextmanager
def attached(daemon: Daemon) -> Iterator[Stream]:
    """Orders as an agent gets them."""
    descriptors = DescriptorClient(f"{daemon.socket}.fd")
    channel = Channel(daemon.address, lambda: descriptors.token)
    yield channel.stream("Attach", m.AttachRequest(m.PROTOCOL, os.getpid()))
    channel.close()
    descriptors.close()


def order(events: Stream) -> m.SamplingOrder:
    event = next(events)
    assert event.kind == "sample"
    return event.sampling


def test_a_watchers_wish_holds_while_it_watches() -> None:
    configured = m.SamplingOrder("present", 0.1, 0.01)
    with Daemon("--sampler", "present") as daemon, daemon.client() as client, attached(daemon) as events:
        assert next(events).kind == "attached"
        assert order(events) == configured
        often = client.watch(epoch_s=0.02)
        assert order(events) == m.SamplingOrder("present", 0.02, 0.01)
        dear = client.watch(epoch_s=0.05, budget=0.5)
        assert order(events) == m.SamplingOrder("present", 0.02, 0.5)
        often.cancel()
        assert order(events) == m.SamplingOrder("present", 0.05, 0.5)
        modest = client.watch(epoch_s=60, budget=0.001)
        time.sleep(0.2)
        modest.cancel()
        dear.cancel()
        assert order(events) == configured, "nobody is sampled less because of a wish, so that no order came of it"


@pytest.mark.parametrize(
    "wish",
    [(0, None), (-0.1, None), (0.009, None), (61, None), (None, 0), (None, -0.5), (None, 1.01), (float("nan"), None),
     (None, float("nan")), (float("inf"), None)],
    ids=str,
)  # fmt: skip
def test_a_wish_that_no_daemon_would_be_configured_with_is_refused(
    daemon: Daemon, client: Client, wish: tuple[float | None, float | None]
) -> None:
    with pytest.raises((ConfigError, ProtocolError)):
        next(client.watch(*wish))
    with attached(daemon) as events:
        assert next(events).kind == "attached"
        assert order(events) == m.SamplingOrder("present", 0.02, 1.0)


def test_a_watcher_that_does_not_read_loses_frames_and_the_daemon_no_memory(tmp_path: Path) -> None:
    names = [f"{i:04}{'x' * 996}" for i in range(2000)]
    entries = {name: entry("U8", [1], i, i + 1) for i, name in enumerate(names)}
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "model" / "model.safetensors", header_text(entries), bytes(len(names)))
    opens = 60
    with Daemon("--sampler", "off") as daemon, daemon.client() as client:
        stream = client.watch()
        client.load(tmp_path / "model")
        for _ in range(opens):
            client.open("model").close()
        assert resident_bytes(daemon.pid) < 700 << 20
        with Watching(stream) as watching:
            eventually(lambda: watching.nbytes > 40 << 20, "what had found room arrives")
            with client.open("model") as model:
                watching.until("open", lease=model._holder._lease_id)  # type: ignore[attr-defined]
            assert 0 < watching.dropped < 4 * opens
            assert watching.nbytes < (64 + 16) << 20 < opens * 2_000_000


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_scrape_shows_who_is_observed(daemon: Daemon, client: Client, weights: Weights, port: int) -> None:
    before = scrape(port)
    with reader(weights.path, daemon.address, 1) as child:
        eventually(lambda: (columns(client, weights.name).rate > 0).any(), "touches were seen")
        found = scrape(port)
        assert found["tiermem_clients"] == found["tiermem_models"] == {"": 1}
        for name in ("windows", "pages", "touched", "sampler_seconds", "client_seconds"):
            name = f"tiermem_sampling_{name}_total"
            assert found[name]["present"] > before.get(name, {}).get("present", 0), name
        assert child.alive
    with socket.create_connection(("127.0.0.1", port)):
        pass
    addresses = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((str(address), port), 1)


def test_a_daemon_whose_metrics_port_is_taken_leaves_nothing(port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with Daemon("--metrics-port", str(number), start=False) as daemon, daemon.spawn() as child:
            assert child.exit_code() == 2
            assert f"cannot serve metrics at 127.0.0.1:{number}" in child.errors
            assert "Traceback" not in child.errors
            assert daemon.leftovers == []


def test_an_embedded_pool_knows_its_own_process(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model", layers=LAYERS)
    with Child.script(EMBEDDED, weights.path, tmp_path) as child:
        assert child.line() == "[False, False, True, False, False, False]"


EMBEDDED = """
from tiermem.config import load_config
pool = tiermem.Pool(load_config({"state": sys.argv[2], "digests": sys.argv[2] + "/d", "sample_epoch": "20ms",
                                 "sample_budget": "100%", "sampler": "present", "tier": "dram=64MiB"}))
model = pool.open(sys.argv[1])
array = model["model.layers.2.weight"]
deadline = time.monotonic() + 10
while time.monotonic() < deadline:
    for _ in range(1000):
        array[::4096].sum()
    columns = pool.heat("model").columns
    if columns.known.all() and (columns.rate > 0).any():
        break
say((columns.rate > 0).tolist())
"""


def test_pages_that_a_device_reads_are_untrackable_and_not_cold(client: Client, weights: Weights) -> None:
    with client.open(weights.path) as model:
        model.wait()
        names = list(model)
        eventually(lambda: busy_until(model, lambda: all_known(client, weights.name)), "every page was looked for")
        model.mark_pinned(names[:1])
        eventually(lambda: (seen(client, os.getpid()) or {}).get("untrackable_pages", 0) > 0, "the pool was told")
        entry = seen(client, os.getpid())
        assert entry is not None
        start, _ = model.place(model.info(names[0]))
        end = start + model.info(names[0]).nbytes
        assert entry["untrackable_pages"] == -(-end // PAGE_BYTES) - start // PAGE_BYTES
        before = columns(client, weights.name).sampled[start // PAGE_BYTES]
        others = columns(client, weights.name).sampled.max()
        eventually(lambda: busy_until(model, lambda: columns(client, weights.name).sampled.max() > others + 3),
                   "other pages are sampled on")  # fmt: skip
        assert columns(client, weights.name).sampled[start // PAGE_BYTES] <= before + 1
        with pytest.raises(TensorNotFound):
            model.mark_pinned(["no such tensor"])


def busy_until(model: Model, holds: Callable[[], bool]) -> bool:
    """Use the model for a moment, as a client that is idle is not sampled; whether it holds then."""
    for name in model:
        model[name].sum()
    return holds()
