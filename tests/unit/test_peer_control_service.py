"""What a peer may ask of a pool, over loopback TCP with TLS: models, leases, tokens, and the limits of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from blake3 import blake3

from tests.certificates import Authority, Certificate
from tests.conftest import Checkpoint, CheckpointWriter, ConfigMaker, until
from tests.integration.gate import Gate, Running
from tests.owner import Loop, Owner, tls_of
from tests.unit.paint import TENSORS, prints
from tiermem import errors, peer_service
from tiermem.images import Images
from tiermem.lease import Session
from tiermem.peer.receiver import DataConnection
from tiermem.peer.remote import RemoteModel, RemotePool
from tiermem.peer_service import SESSIONS_PER_PEER, TOKENS_PER_GRANT
from tiermem.rpc import messages as m
from tiermem.rpc import peer_messages as p
from tiermem.rpc.channel import PeerChannel

Serve = Callable[..., Owner]


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def own(authority: Authority) -> Certificate:
    return authority.issue("pool-a")


@pytest.fixture(scope="module")
def b(authority: Authority) -> Certificate:
    return authority.issue("pool-b", alternatives="")


@pytest.fixture
def serve(loop: Loop, config: ConfigMaker, own: Certificate) -> Iterator[Serve]:
    made: list[Owner] = []

    def make(**options: object) -> Owner:
        made.append(Owner(loop, config, own, **options))
        return made[-1]

    yield make
    for owner in made:
        owner.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def opened(remote: RemotePool, name: str = "model") -> RemoteModel:
    return remote.open(name=name)


def received(remote: RemotePool, model: RemoteModel, tls: Certificate) -> dict[str, bytes]:
    """Every tensor, by one data connection."""
    (token,) = remote.grant(model.lease_id, range(len(model.manifest.segments)))
    tensors = {}
    with DataConnection(remote.data, token, tls_of(tls).client, 10) as connection:
        for tensor in model.manifest.tensors:
            target = memoryview(bytearray(tensor.nbytes))
            connection.fetch(tensor.extent.segment, tensor.extent.offset, target)
            tensors[tensor.name] = bytes(target)
    return tensors


def same(written: Checkpoint, tensors: dict[str, bytes]) -> bool:
    return tensors == {name: array.tobytes() for name, array in written.tensors.items()}


def test_a_peer_opens_a_model_and_gets_its_bytes(serve: Serve, b: Certificate, checkpoint: CheckpointWriter) -> None:
    owner, written = serve(), checkpoint(layers=3)
    record = owner.load(written.path)
    with owner.connect(b) as remote:
        have = remote.have(name="model")
        assert (have.model_id, have.name, have.nbytes, have.ready) == (record.id, "model", written.nbytes, b"\x3f")
        assert len(owner.pool.leases) == 0
        model = opened(remote)
        assert model.manifest == record.manifest
        assert model.ready.all()
        for tensor, digest in zip(model.manifest.tensors, model.digests, strict=True):
            assert digest == blake3(written.tensors[tensor.name].tobytes()).digest()
        assert same(written, received(remote, model, b))
        assert remote.open(identity=record.id).manifest == record.manifest
        assert len(owner.pool.leases) == 2
        remote.release(model.lease_id)
        remote.release(model.lease_id)
        assert len(owner.pool.leases) == 1
        with pytest.raises(errors.Refused, match="not held"):
            remote.grant(model.lease_id, [0])


def test_names_and_identities_that_nothing_has(serve: Serve, b: Certificate, checkpoint: CheckpointWriter) -> None:
    owner = serve()
    owner.load(checkpoint("secret-name").path)
    with owner.connect(b) as remote:
        for ask in (remote.open, remote.have):
            with pytest.raises(errors.ModelNotFound, match="no model 'other'") as caught:
                ask(name="other")
            assert "secret" not in str(caught.value)
            with pytest.raises(errors.ModelNotFound, match="identity 'ff'"):
                ask(identity="ff")
            with pytest.raises(errors.ProtocolError, match="one of the two"):
                ask()
            with pytest.raises(errors.ProtocolError, match="one of the two"):
                ask(name="other", identity="ff")


def test_rules_say_who_reads_what(
    serve: Serve, b: Certificate, authority: Authority, checkpoint: CheckpointWriter
) -> None:
    owner = serve(allow=["pool-b=open-*", "pool-c=*"])
    open_id = owner.load(checkpoint("open-1").path).id
    closed_id = owner.load(checkpoint("closed", seed=1).path).id
    with owner.connect(b) as remote, owner.connect(authority.issue("pool-c")) as other:
        assert remote.have(identity=open_id).name == "open-1"
        assert opened(remote, "open-1").name == "open-1"
        for name in ("closed", "absent"):
            with pytest.raises(errors.AccessDenied, match=f"--allow pool-b={name}"):
                opened(remote, name)
        for ask in (remote.open, remote.have):
            with pytest.raises(errors.ModelNotFound) as caught:
                ask(identity=closed_id)
            assert "closed" not in str(caught.value)
        assert opened(other, "closed").manifest.identity == closed_id
    with owner.connect(authority.issue("pool-d")) as stranger, pytest.raises(errors.AccessDenied):
        opened(stranger, "open-1")


def test_a_model_that_is_loading_is_opened_and_waited_for(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter, gate: Gate
) -> None:
    owner, written = serve(), checkpoint()
    record, loaded = owner.pool.load(str(written.path))
    with owner.connect(b) as remote:
        model = opened(remote)
        assert not model.ready.any()
        assert set(model.digests) == {None}
        (token,) = remote.grant(model.lease_id, [0, 1])
        with DataConnection(remote.data, token, tls_of(b).client, 10) as connection:
            with pytest.raises(errors.Refused, match="not received"):
                connection.fetch(0, 0, memoryview(bytearray(32)))
            with pytest.raises(errors.DeadlineExceeded):
                remote.wait(model, [0], timeout_s=0.05)
            waiting = Running(remote.wait, model, [2, 0])
            gate.open()
            ready, digests = waiting.answer()
            assert ready[[0, 2]].all()
            names = [record.manifest.tensors[i].name for i in (2, 0)]
            assert list(digests) == [blake3(written.tensors[name].tobytes()).digest() for name in names]
        ready, digests = remote.wait(model)
        assert ready.all()
        assert len(digests) == len(written.tensors)
        assert same(written, received(remote, model, b))
    loaded.result(20)


def test_a_load_that_fails_is_told_to_who_waits(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter, gate: Gate
) -> None:
    owner, written = serve(), checkpoint()
    owner.pool.load(str(written.path))
    with owner.connect(b) as remote:
        model = opened(remote)
        waiting = Running(remote.wait, model)
        (token,) = remote.grant(model.lease_id, [0])
        written.files[0].write_bytes(b"another")
        gate.open()
        with pytest.raises(errors.CheckpointChanged):
            waiting.answer()
        with pytest.raises(errors.CheckpointChanged):
            remote.grant(model.lease_id, [0])
        with (
            pytest.raises(errors.Refused),
            DataConnection(remote.data, token, tls_of(b).client, 10) as connection,
        ):
            connection.fetch(0, 0, memoryview(bytearray(32)))


def test_an_evicted_model_is_loaded_again_by_an_open_and_not_by_a_question(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter
) -> None:
    owner, written = serve(), checkpoint()
    record = owner.load(written.path)
    owner.pool.evict("model")
    with owner.connect(b) as remote:
        assert remote.have(name="model").ready == b"\0"
        assert record.missing()
        model = opened(remote)
        remote.wait(model)
        assert same(written, received(remote, model, b))


def test_an_image_is_not_sent_before_it_is_sealed(serve: Serve, b: Certificate) -> None:
    owner = serve()
    images, session = Images(owner.pool), Session(1, 0)
    lease = images.create(session, prints(), TENSORS, "image", None)[0].lease
    try:
        with owner.connect(b) as remote:
            for ask in (remote.open, remote.have):
                with pytest.raises(errors.Refused, match="still being filled"):
                    ask(name="image")
            images.seal(lease).result(20)
            assert opened(remote, "image").ready.all()
    finally:
        owner.pool.end_session(session)


def test_limits_of_a_peer(serve: Serve, b: Certificate, authority: Authority, checkpoint: CheckpointWriter) -> None:
    owner = serve(peer_fetches=2)
    owner.load(checkpoint().path)
    with owner.connect(b) as one, owner.connect(b) as two, owner.connect(authority.issue("pool-c")) as other:
        leases = [opened(one).lease_id, opened(two).lease_id]
        for remote in (one, two):
            with pytest.raises(errors.Refused, match="fetches 2 models at once already"):
                opened(remote)
        opened(other)
        one.release(leases[0])
        opened(two)
        more = [owner.connect(b) for _ in range(SESSIONS_PER_PEER - 2)]
        with pytest.raises(errors.Refused, match=f"{SESSIONS_PER_PEER} sessions"):
            owner.connect(b)
        for session in more:
            session.close()


def test_the_end_of_a_session_ends_its_leases_tokens_and_connections(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter
) -> None:
    owner = serve()
    owner.load(checkpoint().path)
    remote = owner.connect(b)
    model = opened(remote)
    used, unused = remote.grant(model.lease_id, [0], 2)
    with DataConnection(remote.data, used, tls_of(b).client, 10) as connection:
        connection.fetch(0, 0, memoryview(bytearray(32)))
        remote.close()
        until(lambda: len(owner.pool.leases) == 0)
        with pytest.raises(errors.DaemonUnreachable):
            connection.fetch(0, 0, memoryview(bytearray(32)))
    with pytest.raises(errors.AccessDenied, match="opens nothing"):
        DataConnection(remote.data, unused, tls_of(b).client, 10)


def test_a_lease_that_is_not_used_ends_and_its_session_goes_on(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_service, "LEASE_IDLE_S", 1.0)
    owner, written = serve(), checkpoint()
    owner.load(written.path)
    with owner.connect(b) as remote:
        idle, used = opened(remote), opened(remote)
        (token,) = remote.grant(used.lease_id, [0])
        with DataConnection(remote.data, token, tls_of(b).client, 10) as connection:

            def fetched_until_the_other_ended() -> bool:
                connection.fetch(0, 0, memoryview(bytearray(32)))
                return len(owner.pool.leases) == 1

            until(fetched_until_the_other_ended)
            connection.fetch(0, 0, memoryview(bytearray(32)))
            with pytest.raises(errors.Refused, match="not held"):
                remote.grant(idle.lease_id, [0])
            remote.grant(used.lease_id, [0])
            until(lambda: len(owner.pool.leases) == 0)
            with pytest.raises(errors.DaemonUnreachable):
                connection.fetch(0, 0, memoryview(bytearray(32)))
        assert same(written, received(remote, opened(remote), b))


def test_a_token_is_good_for_its_owner_alone(
    serve: Serve, b: Certificate, own: Certificate, checkpoint: CheckpointWriter
) -> None:
    owner = serve()
    owner.load(checkpoint().path)
    with owner.connect(b) as remote, owner.connect(own) as other:
        model = opened(remote)
        with pytest.raises(errors.Refused, match="not held by this client"):
            other.grant(model.lease_id, [0])
        with pytest.raises(errors.Refused, match="not held by this client"):
            other.wait(model)
        other.release(model.lease_id)
        assert len(owner.pool.leases) == 1
        (token,) = remote.grant(model.lease_id, [0])
        with pytest.raises(errors.AccessDenied, match="opens nothing"):
            DataConnection(remote.data, token, tls_of(own).client, 10)
        tls = tls_of(own)
        thief = PeerChannel(str(owner.address), lambda: remote._token, tls.pem)
        with pytest.raises(errors.AccessDenied, match="an unknown session token"):
            thief.call("PeerHave", p.HaveRequest("model"))
        thief.close()


@pytest.mark.parametrize("subject", ["/CN=pool-b/CN=second", "/O=nameless"])
def test_both_ports_know_a_peer_by_the_same_name(
    serve: Serve, authority: Authority, checkpoint: CheckpointWriter, subject: str
) -> None:
    owner, written = serve(allow=["pool-b=*", "pool-d=*"]), checkpoint()
    owner.load(written.path)
    alternatives = "IP:10.0.0.1,DNS:pool-d,DNS:second"
    name = "pool-b" if "CN" in subject else "pool-d"
    certificate = authority.issue(f"named-{name}", subject=subject, alternatives=alternatives)
    assert tls_of(certificate).name == name
    with owner.connect(certificate) as remote:
        assert same(written, received(remote, opened(remote), certificate))


@pytest.mark.parametrize(
    ("segments", "count", "complaint"),
    [((2,), 1, r"segments 0 to 1, not \[2\]"), ((0, -1), 1, r"not \[-1\]"), ((), 1, "ask for some"),
     ((0,), 0, "0 tokens"), ((0,), -1, "-1 tokens"), ((0,), TOKENS_PER_GRANT + 1, "17 tokens"), ((1 << 63,), 1, "not")],
)  # fmt: skip
def test_tokens_that_nothing_is_given_for(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter, segments: tuple[int, ...], count: int, complaint: str
) -> None:
    owner = serve()
    owner.load(checkpoint().path)
    with owner.connect(b) as remote:
        model = opened(remote)
        with pytest.raises(errors.ProtocolError, match=complaint):
            remote.grant(model.lease_id, segments, count)


def test_a_wait_for_more_tensors_than_there_are(serve: Serve, b: Certificate, checkpoint: CheckpointWriter) -> None:
    owner = serve()
    owner.load(checkpoint().path)
    with owner.connect(b) as remote:
        model = opened(remote)
        for tensors in ([0] * 5, [4], [-1]):
            with pytest.raises(errors.ProtocolError, match="4"):
                remote.wait(model, tensors)


def test_an_open_that_its_peer_gave_up_leaves_no_lease(
    serve: Serve, b: Certificate, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = serve()
    owner.load(checkpoint().path)
    with owner.connect(b) as remote:
        with owner.pool.lock, pytest.raises(errors.DeadlineExceeded):
            remote._channel.call("PeerOpen", p.OpenRequest("model"), timeout_s=0.2)
        opened(remote)
        until(lambda: len(owner.pool.leases) == 1)


def test_another_version_of_the_protocol_is_refused(serve: Serve, b: Certificate) -> None:
    owner, tls = serve(), tls_of(b)
    channel = PeerChannel(str(owner.address), lambda: b"", tls.pem)
    with pytest.raises(errors.ProtocolError, match="upgrade the older one"):
        next(channel.stream("PeerHello", p.HelloRequest(m.PROTOCOL + 1)))
    channel.close()


def test_without_tls_the_loopback_is_served_and_limits_go_by_host(
    loop: Loop, config: ConfigMaker, checkpoint: CheckpointWriter
) -> None:
    owner = Owner(loop, config, None, peer_fetches=1)
    owner.load(checkpoint().path)
    with owner.connect() as one, owner.connect() as two:
        opened(one)
        with pytest.raises(errors.Refused, match=r"127\.0\.0\.1 fetches 1"):
            opened(two)
    owner.close()
