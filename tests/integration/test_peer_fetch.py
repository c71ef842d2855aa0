"""Models that come from another pool: by address, by name, into daemons and embedded pools; and what stays of them when
their peer is gone. What goes wrong with an address is told in one line."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiermem
from tests.certificates import Authority
from tests.conftest import ConfigMaker
from tests.integration.child import Child, eventually
from tests.integration.conftest import PoolMaker
from tests.integration.daemon import Daemon
from tests.integration.gate import used
from tests.integration.weights import Weights, digest_of, layer, write_weights
from tiermem.errors import DaemonUnreachable, ModelNotFound, ReadError
from tiermem.peer.address import Address, ModelAddress, parse_address
from tiermem.types import PAGE_BYTES

LAYERS = 3
NOWHERE = "127.0.0.1:9"


def listener(daemon: Daemon) -> Address:
    """Where other hosts' pools find a daemon."""
    found = re.search(r"listening for peers at (\S+) ", daemon.log)
    assert found, daemon.log
    return parse_address(found[1])


def address_of(daemon: Daemon, name: str) -> str:
    """Of a model of that daemon, for other pools."""
    return str(ModelAddress(listener(daemon), name))


def sent(daemon: Daemon) -> int:
    """Bytes of weights that it sent to others."""
    return int(daemon.status()["remote"]["sent_bytes"])


@pytest.fixture(scope="module")
def owner() -> Iterator[Daemon]:
    with Daemon("--listen", "127.0.0.1:0") as daemon:
        yield daemon
        eventually(lambda: daemon.leases() == 0, "what was fetched from it was given back")
        assert "Traceback" not in daemon.log


@pytest.fixture
def weights(owner: Daemon, tmp_path: Path) -> Iterator[Weights]:
    """Resident at the owner."""
    written = write_weights(tmp_path / tmp_path.name, layers=LAYERS)
    with owner.client() as client:
        client.load(written.path)
        yield written
        eventually(lambda: not client.status(written.name)["models"][0]["peers"], "its peers gave it back")
        client.remove(written.name)


@pytest.fixture
def nbytes(weights: Weights) -> int:
    return sum(map(len, weights.tensors.values()))


def same(pool: tiermem.Client | tiermem.Pool, name: str, weights: Weights) -> bool:
    with pool.open(name) as model:
        return digest_of(model) == weights.digest


def test_it_is_fetched_once_by_its_address_and_evicted_and_fetched_again(
    owner: Daemon, weights: Weights, nbytes: int
) -> None:
    before, address = sent(owner), address_of(owner, weights.name)
    with Daemon() as daemon, daemon.client() as client:
        assert client.load(address) == weights.name
        assert same(client, weights.name, weights)
        assert same(client, address, weights)
        assert sent(owner) - before == nbytes
        assert client.evict(weights.name) == LAYERS * PAGE_BYTES
        assert same(client, weights.name, weights)
        assert sent(owner) - before == 2 * nbytes
        status = daemon.status()["remote"]["peers"]
        assert [(peer["address"], peer["received_bytes"]) for peer in status] == [(str(listener(owner)), 2 * nbytes)]
        client.remove(weights.name)


def test_a_name_that_the_pool_lacks_is_looked_for_at_its_peers(owner: Daemon, weights: Weights) -> None:
    with Daemon("--peer", NOWHERE, "--peer", str(listener(owner))) as daemon, daemon.client() as client:
        assert same(client, weights.name, weights)
        with pytest.raises(ModelNotFound):
            client.open("that-nobody-has")
        assert f"peer {NOWHERE} was not asked" in daemon.log


def test_it_may_have_another_name_here(owner: Daemon, weights: Weights) -> None:
    with Daemon() as daemon, daemon.client() as client:
        assert client.load(address_of(owner, weights.name), "mine") == "mine"
        assert same(client, "mine", weights)


POLICY = """
class Mine:
    sources = {sources}
    def plan(self, view):
        return []
"""


@pytest.mark.parametrize(
    ("sources", "times"), [(("peer", "disk"), 1), (("disk", "peer"), 0), (("disk",), 0), (None, 1)]
)
def test_a_checkpoint_of_this_host_comes_from_where_the_policy_says(
    owner: Daemon, weights: Weights, nbytes: int, tmp_path: Path, sources: tuple[str, ...] | None, times: int
) -> None:
    policy = tmp_path / "mine.py"
    policy.write_text(POLICY.format(sources=sources))
    flags = ("--policy", str(policy)) if sources else ()
    with Daemon("--peer", str(listener(owner)), *flags) as daemon, daemon.client() as client:
        assert same(client, weights.path, weights)
        before = sent(owner)
        client.evict(weights.name)
        assert same(client, weights.path, weights)
        assert sent(owner) - before == times * nbytes
        if sources == ("disk",):
            with pytest.raises(ModelNotFound):
                client.open("what-only-a-peer-has")


def test_a_checkpoint_of_this_host_needs_no_peer(weights: Weights) -> None:
    with (
        Daemon("--listen", "127.0.0.1:0") as other,
        Daemon("--peer", str(listener(other)), "--peer", NOWHERE) as daemon,
        daemon.client() as client,
    ):
        for _ in range(2):
            assert same(client, weights.path, weights)
            client.evict(weights.name)
        other.kill9()
        assert same(client, weights.path, weights)


def test_a_pool_that_has_itself_among_its_peers_asks_the_others(owner: Daemon, weights: Weights) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        here = f"127.0.0.1:{probe.getsockname()[1]}"
    with Daemon("--listen", here, "--peer", here, "--peer", str(listener(owner))) as daemon, daemon.client() as client:
        assert same(client, weights.name, weights)
        assert f"{here} is this pool itself; leave it out of --peer" in daemon.log


def test_an_embedded_pool_fetches_as_a_daemon_does(owner: Daemon, weights: Weights, embedded: PoolMaker) -> None:
    pool = embedded(peer=[str(listener(owner))])
    assert same(pool, weights.name, weights)
    eventually(lambda: not owner.model(weights.name)["peers"], "what is whole is not held at the peer")
    other = embedded(digests=pool._pool.config.state / "others", transient=True)
    assert same(other, address_of(owner, weights.name), weights)
    eventually(lambda: used(other) == 0, "the reader took it along")


def test_a_program_without_a_daemon_opens_it_by_its_address(owner: Daemon, weights: Weights) -> None:
    text = """
with tiermem.open(sys.argv[1]) as model:
    say(digest_of(model))
"""
    with Child.script(text, address_of(owner, weights.name)) as child:
        assert child.line() == weights.digest


def test_it_stays_readable_and_is_adopted_when_its_peer_is_gone(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model", layers=LAYERS)
    with Daemon("--listen", "127.0.0.1:0") as owner, Daemon() as daemon:
        assert owner.serves(weights)
        address = address_of(owner, weights.name)
        with daemon.client() as client:
            client.load(address)
            with client.open(weights.name) as model:
                owner.kill9()
                assert digest_of(model) == weights.digest
        daemon.settle()
        daemon.restart()
        (state,) = daemon.settle()
        assert (state["state"], state["last_load"]["check_only"]) == ("resident", True)
        with daemon.client() as client:
            assert same(client, weights.name, weights)
            client.evict(weights.name)
            with client.open(weights.name) as model, pytest.raises(ReadError, match="no peer sends the rest"):
                model[layer(0)]
            with pytest.raises(DaemonUnreachable, match="no pool listens"):
                client.load(address)
            owner.start()
            with owner.client() as client_of_owner:
                assert same(client_of_owner, weights.name, weights)


def test_tls_secures_weights_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    weights = write_weights(tmp_path / "model", layers=LAYERS)
    secured = authority.issue("pool-a").flags
    with (
        Daemon("--listen", "127.0.0.1:0", "--allow", "pool-b=mod*", *secured) as owner,
        Daemon(*authority.issue("pool-b").flags) as daemon,
        daemon.client() as client,
    ):
        assert owner.serves(weights)
        client.load(address_of(owner, weights.name))
        assert same(client, weights.name, weights)


# --- what is said of an address that nothing comes from -------------------------------------------------------------


def said(daemon: Daemon, address: str) -> tuple[int, str]:
    """Exit code of `tiermem load`, and the line that it wrote."""
    with Child(["-m", "tiermem", "load", address, "--address", daemon.address]) as child:
        code = child.exit_code(60)
        lines = child.errors.splitlines()
        assert len(lines) == 1, lines
        return code, lines[0]


@pytest.fixture(scope="module")
def plain() -> Iterator[Daemon]:
    """A daemon that lacks everything, and has no TLS."""
    with Daemon() as daemon:
        yield daemon
        assert daemon.status()["models"] == ()
        assert "Traceback" not in daemon.log


@pytest.mark.parametrize(
    ("address", "code", "complaint"),
    [
        ("tiermem://127.0.0.1:7070", 4, "it must be tiermem://HOST:PORT/NAME"),
        ("tiermem://127.0.0.1/model", 4, "it must be HOST:PORT"),
        ("tiermem://127.0.0.1:70700/model", 4, "must be a number below 65536"),
        ("tiermem://::1:7070/model", 4, "in brackets"),
        (f"tiermem://{NOWHERE}/model", 3, "no pool listens at 127.0.0.1:9 .*tiermem serve --listen"),
        ("tiermem://no-such-host.invalid:7070/model", 2, "--insecure"),
        ("tiermem://192.0.2.1:7070/model", 2, "--tls-cert, --tls-key and --tls-ca"),
    ],
)
def test_addresses_that_lead_nowhere(plain: Daemon, address: str, code: int, complaint: str) -> None:
    ended, line = said(plain, address)
    assert re.search(complaint, line), line
    assert ended == code


def test_a_model_that_the_peer_lacks(plain: Daemon, owner: Daemon) -> None:
    ended, line = said(plain, address_of(owner, "nothing"))
    assert "the pool that was asked has no model 'nothing'" in line
    assert ended == 4


def test_a_port_where_something_else_listens(plain: Daemon, owner: Daemon) -> None:
    """The data port of a pool, which is easily mistaken for the other."""
    here = str(listener(owner))
    found = re.search(r"weights leave by port (\d+)", owner.log)
    assert found
    ended, line = said(plain, f"tiermem://127.0.0.1:{found[1]}/model")
    assert ended in (1, 3)
    assert here not in line
    assert f"127.0.0.1:{found[1]}" in line


def test_a_pool_that_does_not_let_us_in(plain: Daemon, tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "other")
    weights = write_weights(tmp_path / "closed")
    secured = authority.issue("pool-a").flags
    with Daemon("--listen", "127.0.0.1:0", "--allow", "pool-b=open", *secured) as owner:
        assert owner.serves(weights)
        address = address_of(owner, "closed")
        ended, line = said(plain, address)
        assert "speaks TLS only; give --tls-cert" in line
        assert ended == 5
        with Daemon(*authority.issue("pool-b").flags) as b, Daemon(*stranger.issue("pool-b").flags) as false_b:
            ended, line = said(b, address)
            assert "pool-b (127.0.0.1) may not read 'closed'" in line
            assert ended == 5
            ended, line = said(false_b, address)
            assert "not accepted" in line or "does not accept" in line
            assert ended == 5
        assert not owner.model("closed")["peers"]


def test_a_pool_without_tls_is_not_called_with_it(owner: Daemon, tmp_path: Path) -> None:
    with Daemon(*Authority(tmp_path).issue("pool-b").flags) as daemon:
        ended, line = said(daemon, address_of(owner, "model"))
        assert "does not speak TLS" in line
        assert ended == 3


def test_arrays_of_a_fetched_model_are_as_those_of_its_files(
    owner: Daemon, weights: Weights, config: ConfigMaker, embedded: PoolMaker
) -> None:
    with embedded().open(address_of(owner, weights.name)) as model:
        assert np.array_equal(model[layer(1)], np.frombuffer(weights.tensors[layer(1)], np.uint8))
        assert model.manifest.path == address_of(owner, weights.name)
