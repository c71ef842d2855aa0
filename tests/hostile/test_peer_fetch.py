"""Fetching from peers that die, hang, lie, change their mind or are cut off: a load goes on where it can, ends with an
error where it cannot, and shows nobody a byte that is not right. Whoever reads on either host does not notice."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Checkpoint, CheckpointWriter, ConfigMaker
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.gate import Running
from tests.integration.namespaces import Network, NetworkHost
from tests.integration.weights import Weights, digest_of, layer, write_weights
from tests.owner import Loop, Owner
from tiermem.errors import DaemonUnreachable, DeadlineExceeded, DigestMismatch, ReadError, Refused
from tiermem.lease import Session
from tiermem.peer.grants import Grant
from tiermem.peer.remote import RemotePool
from tiermem.peer_service import PeerService
from tiermem.pool import Pool

RATE = "160mbit"
LAYERS, LAYER_BYTES = 30, 2 << 20
NBYTES = LAYERS * LAYER_BYTES
IN_FLIGHT_BYTES = 4 * (4 << 20)
"""What may come a second time: on each of four connections a tensor that was under way, and what the kernel held."""

HEADERS = 1.03
"""Ethernet, IP and TCP, and acknowledgements the other way."""

PATIENCE_S = 1.5
"""Most that an open of a resident model may take on a busy machine."""


class Site:
    """Three hosts by slow cables: `one` and `two` have the model, `here` has a model of its own."""

    def __init__(self, network: Network, directory: Path) -> None:
        self.directory = directory
        self.weights = write_weights(directory / "far", LAYERS, layer_bytes=LAYER_BYTES)
        self.own = write_weights(directory / "near")
        self.hosts = [network.host(RATE) for _ in range(3)]
        self.made: list[Daemon] = []

    def owner(self, host: NetworkHost, *options: str) -> Daemon:
        """A daemon there that has the model."""
        daemon = self.daemon(host, "--listen", f"{host.address}:7070", "--insecure", *options)
        assert daemon.serves(self.weights)
        return daemon

    def daemon(self, host: NetworkHost, *options: str) -> Daemon:
        self.made.append(Daemon(*options, tier="dram=512MiB", prefix=host.prefix))
        return self.made[-1]

    def here(self, *peers: NetworkHost) -> Daemon:
        """The daemon that fetches, with these peers."""
        flags = [text for peer in peers for text in ("--peer", f"{peer.address}:7070")]
        daemon = self.daemon(self.hosts[2], "--insecure", *flags)
        assert daemon.serves(self.own)
        return daemon


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Network() as network:
        site = Site(network, tmp_path)
        try:
            yield site
            for daemon in site.made:
                assert "Traceback" not in daemon.log
        finally:
            for daemon in site.made:
                daemon.close()


class Reader:
    """Opens a model of its host again and again; none of its opens may take long."""

    def __init__(self, daemon: Daemon, weights: Weights) -> None:
        self._daemon, self._weights = daemon, weights
        self.slowest_s, self.opens = 0.0, 0
        self._ending = threading.Event()
        self._running = Running(self._run)

    def _run(self) -> None:
        with self._daemon.client() as client:
            while not self._ending.wait(0.02):
                begin = time.monotonic()
                client.open(self._weights.path).close()
                self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
                self.opens += 1

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._running.answer()
        assert self.opens
        assert self.slowest_s < PATIENCE_S, f"an open took {self.slowest_s:.2f} s"


def loading(daemon: Daemon, address: str) -> Running:
    def load() -> str:
        with daemon.client() as client:
            return client.load(address)

    return Running(load)


def answer(load: Running, timeout_s: float = 90.0) -> Any:
    eventually(lambda: not load.running, "the load ends", timeout_s)
    return load.answer()


def arrived(daemon: Daemon, share: float) -> None:
    """Wait until so much of the model is there."""
    with daemon.client() as client:

        def there() -> bool:
            models = client.status()["models"]
            return any(model["name"] == "far" and model["ready_bytes"] >= share * NBYTES for model in models)

        eventually(there, "a part of the model came", 20)


def holds_nothing(daemon: Daemon) -> bool:
    """Of the model that was to come."""
    status = daemon.status()
    return [model["name"] for model in status["models"]] == ["near"] and status["tiers"][0]["used_bytes"] == (4 << 20)


def right(daemon: Daemon, weights: Weights) -> bool:
    with daemon.client() as client, client.open(weights.name) as model:
        return digest_of(model) == weights.digest


def kill(daemon: Daemon, host: NetworkHost) -> None:
    daemon.kill9()


def stop(daemon: Daemon, host: NetworkHost) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)


def cut(daemon: Daemon, host: NetworkHost) -> None:
    host.cut()


@pytest.mark.root
@pytest.mark.parametrize("end", [kill, stop, cut])
def test_another_peer_sends_the_rest(site: Site, end: Callable[[Daemon, NetworkHost], None]) -> None:
    one, two = site.hosts[:2]
    first, second = site.owner(one), site.owner(two)
    here = site.here(two)
    before = site.hosts[2].received_bytes
    with Reader(here, site.own), Reader(second, site.weights):
        load = loading(here, f"tiermem://{one.address}:7070/far")
        arrived(here, 0.3)
        end(first, one)
        assert answer(load) == "far"
    assert here.serves(site.own)
    assert right(here, site.weights)
    came = site.hosts[2].received_bytes - before
    assert came < HEADERS * (NBYTES + IN_FLIGHT_BYTES)
    assert second.status()["remote"]["sent_bytes"] < 0.75 * NBYTES, "what had come did not come again"


@pytest.mark.root
def test_without_another_it_is_a_read_error_and_nothing_stays(site: Site) -> None:
    one = site.hosts[0]
    first, here = site.owner(one), site.here()
    with Reader(here, site.own):
        load = loading(here, f"tiermem://{one.address}:7070/far")
        arrived(here, 0.3)
        with here.client() as client, client.open("far") as model:
            first.kill9()
            with pytest.raises(ReadError, match=r"no peer sends the rest of it: .*10\.77\.0\.1:7070"):
                model[layer(LAYERS - 1)]
        with pytest.raises(ReadError):
            answer(load)
    eventually(lambda: holds_nothing(here), "what had come is gone")


@pytest.mark.root
def test_a_peer_that_comes_back_sends_what_is_missing(site: Site) -> None:
    one = site.hosts[0]
    first, here = site.owner(one), site.here()
    before = site.hosts[2].received_bytes
    with Reader(here, site.own):
        load = loading(here, f"tiermem://{one.address}:7070/far")
        arrived(here, 0.3)
        first.restart()
        assert answer(load) == "far"
    assert right(here, site.weights)
    assert site.hosts[2].received_bytes - before < HEADERS * (NBYTES + IN_FLIGHT_BYTES)


@pytest.mark.root
def test_a_cable_that_is_mended_does_not_end_a_load(site: Site) -> None:
    one = site.hosts[0]
    site.owner(one)
    here = site.here()
    with Reader(here, site.own):
        load = loading(here, f"tiermem://{one.address}:7070/far")
        arrived(here, 0.3)
        one.cut()
        time.sleep(3)  # that is what is tested
        assert load.running
        one.mend()
        assert answer(load) == "far"
    assert right(here, site.weights)


@pytest.mark.root
def test_a_cable_that_is_cut_between_two_calls(site: Site) -> None:
    """Before the first, and then in a session: both are told in bounded time, and the next load finds its way."""
    one = site.hosts[0]
    site.owner(one)
    here = site.here()
    with Reader(here, site.own):
        for _ in range(2):
            one.cut()
            with pytest.raises((DaemonUnreachable, DeadlineExceeded)):
                answer(loading(here, f"tiermem://{one.address}:7070/far"))
            assert holds_nothing(here)
            one.mend()
            assert answer(loading(here, f"tiermem://{one.address}:7070/far")) == "far"
            assert right(here, site.weights)
            with here.client() as client:
                client.remove("far")


@pytest.mark.root
def test_who_waits_for_one_tensor_gets_it_before_the_others(site: Site) -> None:
    one = site.hosts[0]
    long = write_weights(site.directory / "long", 3 * LAYERS, layer_bytes=LAYER_BYTES)
    assert site.owner(one).serves(long)
    here = site.here()
    with here.client() as client, client.open(f"tiermem://{one.address}:7070/long") as model:
        assert bytes(model[layer(3 * LAYERS - 1)]) == long.tensors[layer(3 * LAYERS - 1)]
        (state,) = client.status("long")["models"]
        assert state["ready_bytes"] < 0.75 * 3 * NBYTES
        model.wait()


# --- liars, in this process -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class Pair:
    """An owner and a pool that fetches from it, each with directories of its own."""

    def __init__(self, loop: Loop, config: ConfigMaker, directory: Path) -> None:
        self._loop, self._config, self._directory = loop, config, directory
        self.made: list[Owner | Pool] = []
        self.here = Pool(self._options("here"), embedded=True)
        self.made.append(self.here)

    def _options(self, name: str, **options: object) -> Any:
        directory = self._directory / name
        return self._config(state=directory / "state", digests=directory / "digests", **options)

    def owner(self, name: str) -> Owner:
        self.made.append(Owner(self._loop, lambda **more: self._options(name, **more), None))
        return self.made[-1]  # type: ignore[return-value]

    def pool(self, name: str, **options: object) -> Pool:
        self.made.append(Pool(self._options(name, **options), embedded=True))
        return self.made[-1]  # type: ignore[return-value]

    def fetch(self, owner: Owner, name: str = "model") -> None:
        self.here.load(f"tiermem://{owner.address}/{name}")[1].result(60)

    def close(self) -> None:
        for pool in reversed(self.made):
            pool.close()


@pytest.fixture
def pair(loop: Loop, config: ConfigMaker, tmp_path: Path) -> Iterator[Pair]:
    pair = Pair(loop, config, tmp_path)
    yield pair
    pair.here.check()
    pair.close()


@pytest.fixture
def written(checkpoint: CheckpointWriter) -> Checkpoint:
    return checkpoint(layers=4)


def contents(pool: Pool, name: str) -> bytes:
    """A tensor of the pool's one model, as readers get it."""
    session = Session(os.getpid(), os.geteuid())
    opened = pool.open(session, name="model")
    tensor = opened.record.manifest.tensors[opened.record.manifest.by_name[name]]
    (fd,) = pool.share(opened.lease, [tensor.extent.segment])
    try:
        return os.pread(fd, tensor.nbytes, tensor.extent.offset)
    finally:
        os.close(fd)
        pool.end_session(session)


def empty(pool: Pool) -> bool:
    pool.check()
    return len(pool.catalog) == 0 and pool.tiers.memory[0].used_bytes == 0


def altering(monkeypatch: pytest.MonkeyPatch, alter: Callable[[Pool, int], bool]) -> None:
    """Owners send zeros in place of the segments that `alter` chooses."""
    honest = PeerService.descriptor

    def descriptor(service: PeerService, grant: Grant, segment: int) -> int:
        if not alter(service.pool, segment):
            return honest(service, grant, segment)
        zeros = os.memfd_create("zeros")
        os.ftruncate(zeros, grant.lengths[segment])
        return zeros

    monkeypatch.setattr(PeerService, "descriptor", descriptor)


def test_altered_bytes_are_never_shown(pair: Pair, written: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    altering(monkeypatch, lambda _, segment: segment == 2)
    owner = pair.owner("liar")
    owner.load(written.path)
    session = Session(os.getpid(), os.geteuid())
    opened = pair.here.open(session, f"tiermem://{owner.address}/model")
    waiting = [pair.here.when_ready(opened.lease, tensors) for tensors in ([4], None)]
    for future in waiting:
        with pytest.raises(DigestMismatch, match=r"model\.layers\.2.* on record for tiermem://.*altered by a pool"):
            future.result(20)
    with pytest.raises(DigestMismatch):
        pair.here.share(opened.lease, [2])
    pair.here.end_session(session)
    eventually(lambda: empty(pair.here), "nothing of it stays")
    assert list((pair.here.config.digests).glob("*")) == []


def test_an_honest_peer_sends_what_another_altered(
    loop: Loop, config: ConfigMaker, tmp_path: Path, written: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    liars: list[Pool] = []
    altering(monkeypatch, lambda pool, segment: pool in liars and segment == 2)
    pair = Pair(loop, config, tmp_path)
    try:
        liar, honest = pair.owner("liar"), pair.owner("honest")
        liars.append(liar.pool)
        for owner in (liar, honest):
            owner.load(written.path)
        here = pair.pool("there", peer=[str(liar.address), str(honest.address)])
        here.load(f"tiermem://{liar.address}/model")[1].result(60)
        received = here.peers.figures()
        assert received[liar.address].received_bytes > received[honest.address].received_bytes > 0
        assert all(contents(here, name) == data.tobytes() for name, data in written.tensors.items())
    finally:
        pair.close()


def test_a_model_of_this_host_that_a_peer_altered_comes_from_disk(
    loop: Loop, config: ConfigMaker, tmp_path: Path, written: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    altering(monkeypatch, lambda pool, segment: segment == 2)
    pair = Pair(loop, config, tmp_path)
    try:
        owner = pair.owner("liar")
        owner.load(written.path)
        here = pair.pool("there", peer=[str(owner.address)])
        here.load(str(written.path))[1].result(60)
        assert not owner.pool.peers.sent().sent_bytes
        here.evict("model")
        here.load(str(written.path))[1].result(60)
        assert owner.pool.peers.sent().sent_bytes
        assert all(contents(here, name) == data.tobytes() for name, data in written.tensors.items())
    finally:
        pair.close()


def test_a_peer_cannot_put_its_bytes_in_the_place_of_a_checkpoint_of_this_host(pair: Pair, written: Checkpoint) -> None:
    """It says that its model has the identity and the files of one that lies here: that is another model still."""
    owner = pair.owner("owner")
    record = owner.load(written.path)
    pair.fetch(owner)
    fetched = pair.here.catalog.named("model")
    assert fetched.id != record.id
    own, loaded = pair.here.load(str(written.path), "own")
    loaded.result(20)
    assert own.id == record.id
    assert own.manifest.path == str(written.path)
    for first in (written.path / file.name for file in written.path.iterdir() if file.suffix == ".safetensors"):
        assert pair.here.load(str(first))[0] is own


def test_a_second_try_gets_what_the_first_was_denied(
    pair: Pair, written: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    lies = [True]
    altering(monkeypatch, lambda *_: lies[0])
    owner = pair.owner("liar")
    owner.load(written.path)
    with pytest.raises(DigestMismatch):
        pair.fetch(owner)
    lies[0] = False
    pair.fetch(owner)
    assert pair.here.catalog.named("model").ready.all()


def test_weights_that_are_others_than_last_time_are_refused(
    pair: Pair, written: Checkpoint, damage: Callable[[Path, int], None]
) -> None:
    first = pair.owner("first")
    first.load(written.path)
    pair.fetch(first)
    pair.here.remove("model")
    damage(written.files[0], 100)
    second = pair.owner("second")
    second.load(written.path)
    begin = time.monotonic()
    with pytest.raises(DigestMismatch, match="its weights changed at the peer"):
        pair.fetch(second)
    assert time.monotonic() - begin < 5, "it is not asked again and again"
    assert empty(pair.here)
    pair.fetch(first)
    assert pair.here.catalog.named("model").ready.all()


def test_a_checkpoint_that_was_written_anew_is_another_model(
    pair: Pair, written: Checkpoint, checkpoint: CheckpointWriter
) -> None:
    owner = pair.owner("owner")
    owner.load(written.path)
    pair.fetch(owner)
    old = pair.here.catalog.named("model").id
    owner.pool.remove("model")
    owner.load(checkpoint(layers=4, seed=1).path)
    pair.fetch(owner)
    assert [record.id == old for record in pair.here.catalog] == [False], "nobody reads the old one"


def test_a_session_that_the_peer_ended_is_begun_anew(pair: Pair, written: Checkpoint) -> None:
    owner = pair.owner("owner")
    owner.load(written.path)
    sessions: list[RemotePool] = []

    def ask(session: RemotePool) -> str:
        sessions.append(session)
        if len(sessions) == 1:
            session._stream.cancel()
            for _ in range(1000):  # until the owner has noticed: it refuses the token then
                session.have(name="model")
        return session.have(name="model").name

    assert pair.here.peers.call(owner.address, ask) == "model"
    assert len(sessions) == 2
    assert pair.here.peers.connected(owner.address)
    sessions[1]._stream.cancel()
    eventually(lambda: not pair.here.peers.connected(owner.address), "the session's end is noticed")
    pair.fetch(owner)
    assert pair.here.peers.connected(owner.address)


def test_a_peer_that_refuses_every_read_is_told_as_it_is(
    pair: Pair, written: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reads are refused without end: that is a read error within the time that is given to a restart."""

    def refuse(*_: object) -> bool:
        raise Refused("not now")

    monkeypatch.setattr(PeerService, "available", refuse)
    owner = pair.owner("owner")
    owner.load(written.path)
    with pytest.raises(ReadError, match="cannot be had; open the model again"):
        pair.fetch(owner)
    eventually(lambda: empty(pair.here), "nothing of it stays")
