"""TLS between a real daemon and peers: good certificates are served, and every other kind is told what to do."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.certificates import Authority, Certificate, self_signed
from tests.integration.child import Child, eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, digest_of, write_weights
from tests.owner import tls_of
from tiermem.errors import AccessDenied, DaemonUnreachable, DeadlineExceeded
from tiermem.peer import remote as remote_module
from tiermem.peer.address import Address, parse_address
from tiermem.peer.receiver import DataConnection
from tiermem.peer.remote import RemotePool
from tiermem.peer.tls import Tls
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.channel import PeerChannel


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"), "other")


@pytest.fixture(scope="module")
def b(authority: Authority) -> Certificate:
    return authority.issue("pool-b")


@pytest.fixture(scope="module")
def secure(authority: Authority) -> Iterator[Daemon]:
    with Daemon("--listen", "127.0.0.1:0", *authority.issue("pool-a").flags) as daemon:
        yield daemon
        assert "Traceback" not in daemon.log


@pytest.fixture(scope="module")
def clear() -> Iterator[Daemon]:
    with Daemon("--listen", "127.0.0.1:0") as daemon:
        yield daemon


def listener(daemon: Daemon) -> Address:
    found = re.search(r"listening for peers at (\S+) ", daemon.log)
    assert found, daemon.log
    return parse_address(found[1])


def data_port(daemon: Daemon) -> Address:
    return Address("127.0.0.1", int(daemon.status()["remote"]["data_port"]))


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return write_weights(tmp_path / tmp_path.name, layers=3)


@pytest.mark.parametrize("kind", ["secure", "clear"])
def test_weights_cross_between_processes(
    kind: str, request: pytest.FixtureRequest, b: Certificate, weights: Weights
) -> None:
    daemon: Daemon = request.getfixturevalue(kind)
    tls = tls_of(b) if kind == "secure" else None
    with daemon.client() as client, RemotePool(listener(daemon), tls) as remote:
        name = client.load(weights.path)
        model = remote.open(name=name)
        assert daemon.leases() == 1
        remote.wait(model)
        (token,) = remote.grant(model.lease_id, range(3))
        arrays = {}
        with DataConnection(remote.data, token, tls and tls.client, 10) as connection:
            for tensor in model.manifest.tensors:
                target = np.empty(tensor.nbytes, np.uint8)
                connection.fetch(tensor.extent.segment, tensor.extent.offset, memoryview(target))
                arrays[tensor.name] = target
        assert digest_of(arrays) == weights.digest
    eventually(lambda: daemon.leases() == 0, "the lease ended with the session")


def test_a_killed_peer_leaves_no_lease(secure: Daemon, b: Certificate, weights: Weights) -> None:
    with secure.client() as client:
        name = client.load(weights.path)
    script = (
        "from tests.certificates import Certificate\nfrom tests.owner import tls_of\nfrom pathlib import Path\n"
        "from tiermem.peer.address import parse_address\nfrom tiermem.peer.remote import RemotePool\n"
        "remote = RemotePool(parse_address(sys.argv[1]), tls_of(Certificate(*map(Path, sys.argv[3:]))))\n"
        "remote.open(name=sys.argv[2])\nsay('opened')\npause()\n"
    )
    with Child.script(script, listener(secure), name, b.cert, b.key, b.ca) as peer:
        assert peer.line() == "opened"
        assert secure.leases() == 1
        peer.kill9()
        eventually(lambda: secure.leases() == 0, "the lease ended with the peer")


def test_a_restarted_pool_knows_no_old_session(authority: Authority, b: Certificate) -> None:
    with Daemon("--listen", "127.0.0.1:0", *authority.issue("pool-r").flags) as daemon:
        address = listener(daemon)
        with RemotePool(address, tls_of(b)) as remote:
            daemon.restart("--listen", str(address))
            with pytest.raises((DaemonUnreachable, AccessDenied)):
                remote.have(name="x")


def test_a_certificate_of_another_ca(secure: Daemon, b: Certificate, stranger: Authority, tmp_path: Path) -> None:
    other = stranger.issue("pool-b")
    with pytest.raises(
        AccessDenied, match=r"certificate of the pool at .* is not accepted: unable to get local issuer"
    ):
        RemotePool(listener(secure), tls_of(other))
    both = tmp_path / "both.pem"
    both.write_bytes(b.ca.read_bytes() + other.ca.read_bytes())
    with pytest.raises(AccessDenied, match="does not accept the certificate of this one, 'pool-b'"):
        RemotePool(listener(secure), tls_of(replace(other, ca=both)))


def test_no_certificate_and_no_tls(secure: Daemon, clear: Daemon, b: Certificate) -> None:
    with pytest.raises(AccessDenied, match="speaks TLS only; give --tls-cert"):
        RemotePool(listener(secure), None)
    with pytest.raises(DaemonUnreachable, match=r"does not speak TLS .*leave them out here"):
        RemotePool(listener(clear), tls_of(b))
    anonymous = ssl.create_default_context(cafile=str(b.ca))
    anonymous.set_alpn_protocols(["h2"])
    address = listener(secure)
    with socket.create_connection((address.host, address.port), 10) as plain:
        got = b""
        with suppress(OSError), anonymous.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            got = connection.recv(100)
        assert got == b"", "a peer without a certificate is told nothing"


BAD = {
    "expired": (lambda ours, theirs: ours.issue("bad", days=-1), "certificate has expired"),
    "early": (lambda ours, theirs: ours.issue_early("bad"), "certificate is not yet valid"),
    "another CA": (lambda ours, theirs: theirs.issue("bad"), "unable to get local issuer certificate"),
    "self-signed": (lambda ours, theirs: self_signed(ours.directory, "bad"), "self-signed certificate"),
}
"""Certificates that nobody accepts, and what OpenSSL says of them."""


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, tmp_path: Path, stranger: Authority, b: Certificate) -> tuple[Certificate, str]:
    """One of them, for who has the right CA; and what is said of it."""
    make, reason = BAD[request.param]
    authority: Authority = request.getfixturevalue("authority")
    made = make(authority, stranger)
    return replace(made, ca=b.ca), reason


def context_of(certificate: Certificate, purpose: int) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.load_cert_chain(certificate.cert, certificate.key)
    context.load_verify_locations(certificate.ca)
    return context


def test_a_bad_certificate_of_a_peer(secure: Daemon, bad: tuple[Certificate, str]) -> None:
    """As none of ours would show, which looks at its own first."""
    files, _ = bad
    channel = PeerChannel(
        str(listener(secure)), lambda: b"", (files.key.read_bytes(), files.cert.read_bytes(), files.ca.read_bytes())
    )
    with pytest.raises(DaemonUnreachable):
        next(channel.stream("PeerHello", p.HelloRequest(m.PROTOCOL)))
    channel.close()
    with pytest.raises(AccessDenied, match="certificate"):
        DataConnection(data_port(secure), bytes(32), context_of(files, ssl.PROTOCOL_TLS_CLIENT), 10)
    assert "bad" not in [peer["peer"] for peer in secure.status()["remote"]["served"]]


def test_the_name_that_was_called_must_be_in_the_certificate(authority: Authority, b: Certificate) -> None:
    flags = authority.issue("elsewhere", alternatives="DNS:elsewhere.example,IP:10.9.8.7").flags
    tls = tls_of(b)
    with Daemon("--listen", "127.0.0.1:0", *flags) as daemon:
        with pytest.raises(AccessDenied, match=r"IP address mismatch.* name 127\.0\.0\.1"):
            RemotePool(listener(daemon), tls)
        with pytest.raises(AccessDenied, match="IP address mismatch"):
            DataConnection(data_port(daemon), bytes(32), tls.client, 10)


@contextmanager
def impostor(certificate: Certificate | None) -> Iterator[Address]:
    """What listens, and shows a certificate or accepts and is silent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None:
        context.load_cert_chain(certificate.cert, certificate.key)
    held: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                held.append(connection)
                if certificate is not None:
                    with suppress(OSError):
                        held.append(context.wrap_socket(connection, server_side=True))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield Address("127.0.0.1", listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


def test_a_bad_certificate_of_a_pool(b: Certificate, bad: tuple[Certificate, str]) -> None:
    files, reason = bad
    tls = tls_of(b)
    with impostor(files) as address:
        with pytest.raises(AccessDenied, match=f"is not accepted: {reason}; compare --tls-ca"):
            RemotePool(address, tls)
        with pytest.raises(AccessDenied, match=f"TLS with {address} failed: {reason}"):
            DataConnection(address, bytes(32), tls.client, 10)


def test_what_accepts_and_never_answers_is_given_up(b: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_module, "HELLO_TIMEOUT_S", 0.5)
    for tls in (None, tls_of(b)):
        with impostor(None) as address, pytest.raises(DeadlineExceeded, match=r"no answer within 0\.5 s"):
            RemotePool(address, tls)


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(DaemonUnreachable, match=r"Connection refused.*tiermem serve --listen"):
        RemotePool(address, None)
    with pytest.raises(DaemonUnreachable, match=r"no pool listens at nowhere\.invalid:7070"):
        RemotePool(Address("nowhere.invalid", 7070), None)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "/nowhere.pem"], "give --tls-key and --tls-ca too"),
        (["--listen", "127.0.0.1:0", "--allow", "b=x"], "names of certificates"),
        (
            ["--listen", "nowhere.invalid:7070", "--insecure"],
            "nowhere.invalid, data port any: Name or service not known; choose another --listen",
        ),
        (["--listen", "203.0.113.9:7070", "--insecure"], "Cannot assign requested address; choose another --listen"),
        (["--listen", "7070"], "listen = '7070' (--listen): it must be HOST:PORT; for example listen ="),
        (["--peer", "127.0.0.1:1,127.0.0.1:2"], "write --peer 127.0.0.1:1 --peer 127.0.0.1:2"),
        (["--peer", "10.0.0.1:7070"], "--insecure"),
    ],
)
def test_a_daemon_that_cannot_listen_says_why(options: list[str], complaint: str) -> None:
    with Daemon(start=False) as daemon, daemon.spawn(*options) as child:
        assert child.exit_code() in (2, 5)
        (line,) = child.errors.splitlines()
        assert complaint in line


def test_a_daemon_does_not_start_with_what_peers_would_refuse(authority: Authority) -> None:
    flags = authority.issue("expired", days=-1).flags
    with Daemon(start=False) as daemon, daemon.spawn("--peer", "127.0.0.1:1", *flags) as child:
        assert child.exit_code() == 2
        (line,) = child.errors.splitlines()
        assert re.search(r"--tls-cert \S+/expired\.pem cannot be used .* certificate has expired", line), line


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, Daemon(start=False) as daemon:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with daemon.spawn("--listen", where) as child:
            assert child.exit_code() == 2
            assert f"cannot listen at {where}: the port is taken" in child.errors
        assert daemon.leftovers == []


# --- certificates that are replaced under a running daemon ------------------------------------------------------------


def shown(port: Address, tls: Tls) -> str:
    """The serial number of the certificate that a peer is shown at a port."""
    with (
        socket.create_connection((port.host, port.port), 10) as plain,
        tls.client.wrap_socket(plain, server_hostname=port.host) as connection,
    ):
        return str((connection.getpeercert() or {})["serialNumber"])


def warnings_of(daemon: Daemon, text: str) -> int:
    return sum(text in line for line in daemon.log.splitlines())


def test_a_new_certificate_is_shown_and_connections_go_on(tmp_path: Path, weights: Weights) -> None:
    authority = Authority(tmp_path)
    tls = tls_of(authority.issue("pool-b"))
    with Daemon("--listen", "127.0.0.1:0", *authority.issue("pool-a").flags) as daemon, daemon.client() as client:
        ports = listener(daemon), data_port(daemon)
        first = [shown(port, tls) for port in ports]
        assert first[0] == first[1]
        name = client.load(weights.path)
        with RemotePool(ports[0], tls) as before:
            model = before.open(name=name)
            before.wait(model)
            tokens = before.grant(model.lease_id, range(3), 2)
            tensor = model.manifest.tensors[0]
            target = memoryview(bytearray(tensor.nbytes))
            with DataConnection(ports[1], tokens[0], tls.client, 10) as connection:
                connection.fetch(tensor.extent.segment, tensor.extent.offset, target)
                authority.issue("pool-a")
                second = [shown(port, tls) for port in ports]
                assert second[0] == second[1] != first[0]
                connection.fetch(tensor.extent.segment, tensor.extent.offset, target)
            with DataConnection(ports[1], tokens[1], tls.client, 10) as connection:
                connection.fetch(tensor.extent.segment, tensor.extent.offset, target)
            with RemotePool(ports[0], tls) as after:
                assert after.have(name=name).name == before.have(name=name).name == name
        assert "the TLS files changed, and connections use them from now on" in daemon.log


def test_a_pair_that_does_not_fit_is_not_shown(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls = tls_of(authority.issue("pool-b"))
    own = authority.issue("pool-a")
    with Daemon("--listen", "127.0.0.1:0", *own.flags) as daemon:
        ports = listener(daemon), data_port(daemon)
        first = shown(ports[0], tls)
        own.key.write_bytes(tls.pem.key)
        assert [shown(port, tls) for port in (*ports, *ports)] == [first] * 4
        assert warnings_of(daemon, f"stays in use: --tls-key {own.key}: it is not the key of {own.cert}") == 1
        own.cert.write_text("")
        assert [shown(port, tls) for port in ports] == [first] * 2
        assert warnings_of(daemon, "stays in use") == 2
        authority.issue("pool-a")
        assert shown(ports[0], tls) == shown(ports[1], tls) != first
        assert warnings_of(daemon, "stays in use") == 2


def test_a_ca_is_replaced_at_both_ends(tmp_path: Path) -> None:
    for directory in ("first", "second", "used"):
        (tmp_path / directory).mkdir()
    first, second = (Authority(tmp_path / name, f"ca-{name}") for name in ("first", "second"))

    def give(name: str, issuer: Authority, *trusted: Authority) -> Certificate:
        """Put a certificate, and the CAs that are believed, where the pool of that name looks for them."""
        made = issuer.issue(name)
        used = Certificate(*(tmp_path / "used" / f"{name}.{ending}" for ending in ("pem", "key", "ca")))
        used.cert.write_bytes(made.cert.read_bytes())
        used.key.write_bytes(made.key.read_bytes())
        used.ca.write_bytes(b"".join(authority.cert.read_bytes() for authority in trusted))
        return used

    tls = tls_of(give("pool-b", first, first))
    with Daemon("--listen", "127.0.0.1:0", *give("pool-a", first, first).flags) as daemon:
        RemotePool(listener(daemon), tls).close()
        old = give("pool-o", first, second, first)
        give("pool-a", first, second, first)
        give("pool-b", second, second, first)
        RemotePool(listener(daemon), tls).close()
        RemotePool(listener(daemon), tls_of(old)).close()
        give("pool-a", second, second)
        RemotePool(listener(daemon), tls).close()
        # Who still has a certificate of the CA that nobody believes any more.
        with pytest.raises(AccessDenied, match="does not accept the certificate of this one, 'pool-o'"):
            RemotePool(listener(daemon), tls_of(old))
        with pytest.raises(AccessDenied, match=r"TLS with .* failed"):
            DataConnection(data_port(daemon), bytes(32), tls_of(old).client, 10)


def test_the_log_says_when_a_certificate_ends(tmp_path: Path) -> None:
    own = Authority(tmp_path, days=30).issue("pool-a", days=13)
    with Daemon("--peer", "127.0.0.1:1", *own.flags) as daemon:
        assert warnings_of(daemon, f"WARNING tiermem.peer.tls: --tls-cert {own.cert} ends on 20") == 1
