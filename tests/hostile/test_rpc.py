"""Calls that no client of ours would make: each is answered by its own error, and the next good call by its answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import msgpack
import pytest

from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, layer
from tiermem.errors import (
    AccessDenied,
    CheckpointNotFound,
    ModelNotFound,
    ProtocolError,
    Refused,
    TensorNotFound,
    TiermemError,
)
from tiermem.rpc import codec, messages
from tiermem.rpc.descriptors import DescriptorClient
from tiermem.rpc.messages import ERROR_KEY, SESSION_KEY
from tiermem.rpc.methods import METHODS, SERVICE


class Caller:
    """A session that sends any bytes to any method."""

    def __init__(self, daemon: Daemon) -> None:
        self.descriptors = DescriptorClient(f"{daemon.socket}.fd")
        self.token: bytes | None = self.descriptors.token
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(daemon.address, options=options)

    def send(self, method: str, body: bytes, timeout_s: float = 10) -> bytes:
        """The reply. Raises the error that the pool sent, AssertionError for a defect of the pool."""
        path = method if "/" in method else f"/{SERVICE}/{method}"
        known = METHODS.get(method)
        create: Any = self._channel.unary_stream if known and known.streams else self._channel.unary_unary
        metadata = () if self.token is None else ((SESSION_KEY, self.token),)
        try:
            reply = create(path)(body, timeout=timeout_s, metadata=metadata)
            return bytes(next(reply) if known and known.streams else reply)
        except grpc.RpcError as error:
            status: Any = error
            assert status.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED), status.details()
            for key, value in status.trailing_metadata() or ():
                if key == ERROR_KEY:
                    raise codec.error_of(codec.decode(messages.Failure, value)) from None
            raise

    def call(self, method: str, **fields: object) -> Any:
        return msgpack.unpackb(self.send(method, msgpack.packb(fields)), use_list=False)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()
        self.descriptors.close()


@pytest.fixture
def caller(daemon: Daemon, weights: Weights) -> Iterator[Caller]:
    with Caller(daemon) as caller:
        yield caller


@pytest.mark.parametrize("method", ["Nothing", "open", "/tiermem.Pool/", "/tiermem.Other/Open", "/x/y/z"])
def test_unknown_method(caller: Caller, method: str) -> None:
    with pytest.raises(ProtocolError, match="does not know this method"):
        caller.send(method, b"\x80")


BODIES: Mapping[str, bytes] = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "a number": b"\x01",
    "nil": b"\xc0",
    "an array": msgpack.packb([1, 2]),
    "a cut map": b"\x82\xa4name",
    "two maps": b"\x80\x80",
    "a key twice as much": msgpack.packb({"name": "x", "surplus": 1}),
    "keys of bytes": msgpack.packb({b"name": "x"}),
    "keys of numbers": msgpack.packb({1: "x"}),
    "no UTF-8": b"\x81\xa4name\xa2\xff\xfe",
    "an extension": msgpack.packb({"name": msgpack.ExtType(5, b"")}),
    "nested": b"\x81\xa4name" + b"\x91" * 10_000,
    "an array of 4 GiB": b"\x81\xa4name\xdd\xff\xff\xff\xff",
    "a text of 4 GiB": b"\x81\xa4name\xdb\xff\xff\xff\xff",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_body_that_is_no_message(caller: Caller, body: bytes) -> None:
    for method in METHODS.values():
        with pytest.raises(ProtocolError, match=method.request.__name__):
            caller.send(method.name, body)


FIELDS: tuple[tuple[str, dict[str, object], str], ...] = (
    ("Attach", {"protocol": "1", "pid": 1}, r"AttachRequest\.protocol is str"),
    ("Attach", {"protocol": 1}, r"AttachRequest\.pid is missing"),
    ("Attach", {"protocol": 99, "pid": 1}, "upgrade the older one"),
    ("Attach", {"protocol": 1, "pid": 1, "leases": [{"lease_id": "x"}]}, r"leases\[0\]\.model_id is missing"),
    ("Load", {}, r"LoadRequest\.path is missing"),
    ("Load", {"path": None}, r"LoadRequest\.path is nil"),
    ("Load", {"path": b"/x"}, r"LoadRequest\.path is bytes"),
    ("Load", {"path": "/x", "layers": [["a", "b"]]}, r"LoadRequest\.layers is an array"),
    ("Load", {"path": "/x", "layers": {"a": 1}}, r"LoadRequest\.layers"),
    ("Wait", {"lease_id": "x", "tensors": [True]}, r"WaitRequest\.tensors\[0\] is bool"),
    ("Wait", {"lease_id": "x", "timeout_s": "1"}, r"WaitRequest\.timeout_s is str"),
    ("Wait", {"lease_id": "x", "timeout_s": math.nan}, "not a finite number"),
    ("Wait", {"lease_id": "x", "timeout_s": math.inf}, "not a finite number"),
    ("Pin", {"name": ["x"]}, r"PinRequest\.name is an array"),
    ("Status", {"name": 1}, r"StatusRequest\.name is int"),
    ("Digests", {"lease_id": b"x"}, r"DigestsRequest\.lease_id is bytes"),
    ("Replicas", {"lease_id": "x", "carrier": True}, r"ReplicasRequest\.carrier is bool"),
    (
        "Replicas",
        {"lease_id": "x", "carrier": 0, "device": "cpu", "budget_bytes": 0, "capacity_bytes": 0, "pages": "x"},
        r"ReplicasRequest\.pages is str",
    ),
)


@pytest.mark.parametrize(("method", "fields", "words"), FIELDS)
def test_field_of_another_type(caller: Caller, method: str, fields: dict[str, object], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        caller.call(method, **fields)


def test_message_that_is_too_large(caller: Caller) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        caller.send("Pin", msgpack.packb({"name": "x" * (codec.MAX_MESSAGE_BYTES + 1)}))
    status: Any = caught.value
    assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("token", [None, b"", b"x", bytes(16), b"\xff" * 16, bytes(7000)])
def test_token_that_nobody_gave(caller: Caller, weights: Weights, token: bytes | None) -> None:
    caller.token = token
    for method, fields in (
        ("Status", {}),
        ("Open", {"path": str(weights.path)}),
        ("Attach", {"protocol": 1, "pid": 1}),
    ):
        with pytest.raises(AccessDenied, match="session token"):
            caller.call(method, **fields)


def test_token_of_a_session_that_ended(caller: Caller) -> None:
    caller.descriptors.close()

    def refused() -> bool:
        try:
            caller.call("Status")
        except AccessDenied:
            return True
        return False

    eventually(refused, "the token ended with its connection")


def test_lease_of_another_client(daemon: Daemon, caller: Caller, weights: Weights) -> None:
    with Caller(daemon) as other:
        lease = other.call("Open", path=str(weights.path))["lease_id"]
        for foreign in (lease, "", "0" * 16, "\0", "x" * 1000):
            with pytest.raises(Refused, match="not held by this client"):
                caller.call("Wait", lease_id=foreign)
            with pytest.raises(Refused, match="not held by this client"):
                caller.descriptors.fetch(foreign, [0])
            assert caller.call("Release", lease_id=foreign) == {}
        assert daemon.leases() == 1
        assert other.call("Wait", lease_id=lease)["segments"]
        announced = {"lease_id": lease, "model_id": daemon.model(weights.name)["identity"]}
        with pytest.raises(Refused, match="already held by process"):
            caller.call("Attach", protocol=1, pid=1, leases=[announced])
        assert daemon.leases() == 1


def test_announced_leases_of_nothing(daemon: Daemon, caller: Caller, weights: Weights) -> None:
    made_up = [{"lease_id": str(i), "model_id": "x" * i} for i in range(1000)]
    event = caller.call("Attach", protocol=1, pid=-1, leases=made_up)
    assert event["refused"] == tuple(lease["lease_id"] for lease in made_up)
    assert daemon.leases() == 0


@pytest.mark.parametrize("tensors", [[2], [-1], [0, -2], [(1 << 64) - 1], [-(1 << 63)], [0] * 9_999 + [7]])
def test_tensors_that_are_not_there(caller: Caller, weights: Weights, tensors: list[int]) -> None:
    lease = caller.call("Open", path=str(weights.path))["lease_id"]
    with pytest.raises(ProtocolError, match="has 2 tensors, none is number"):
        caller.call("Wait", lease_id=lease, tensors=tensors)


@pytest.mark.parametrize("tensors", [[], [1, 0] * 5_000, None])
@pytest.mark.parametrize("timeout_s", [-1.0, 0, 1e-300, 1e300, None])
def test_unusual_waits_for_what_is_there(
    caller: Caller, weights: Weights, tensors: list[int] | None, timeout_s: float | None
) -> None:
    lease = caller.call("Open", path=str(weights.path))["lease_id"]
    caller.call("Wait", lease_id=lease)
    assert caller.call("Wait", lease_id=lease, tensors=tensors, timeout_s=timeout_s)["ready"] == b"\x03"


NAMES = ["", "../x", "x\0y", "\0", "n" * 100_000, "/etc/passwd", "\n\x1b[2J", "\u202e", "ä" * 1000, "%s{0}"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hostile_name(caller: Caller, weights: Weights, name: str) -> None:
    for method in ("Pin", "Unpin", "Evict", "Remove", "Open", "Status"):
        with pytest.raises(ModelNotFound):
            caller.call(method, name=name)


PATHS = ["", "../x", ".", "x\0y", "/\0", "/" + "p" * 100_000, "/p" * 50_000, "/dev/null", "/proc/self/mem", "/dev/fuse",
         "/proc/self/fd/0", "\u202e"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=range(len(PATHS)))
def test_hostile_path(daemon: Daemon, caller: Caller, weights: Weights, path: str) -> None:
    for method in ("Load", "Open"):
        with pytest.raises(TiermemError) as caught:
            caller.call(method, path=path)
        assert type(caught.value) is not TiermemError
        assert len(str(caught.value).encode()) <= codec.MAX_ERROR_BYTES
    assert daemon.leases() == 0
    assert daemon.status()["models"] == ()


def test_hostile_name_for_a_good_path(daemon: Daemon, caller: Caller, weights: Weights) -> None:
    for name in NAMES:
        reply = caller.call("Load", path=str(weights.path), name=name)
        assert reply["name"] == (name or weights.name)
        eventually(lambda: daemon.status()["models"][0]["state"] == "resident", "loaded")
        caller.call("Pin", name=reply["name"])
        caller.call("Unpin", name=reply["name"])
        caller.call("Remove", name=reply["name"])
    assert daemon.leftovers


def test_layers_of_tensors_that_are_not_there(daemon: Daemon, caller: Caller, weights: Weights) -> None:
    with pytest.raises(TensorNotFound, match="nothing"):
        caller.call("Open", path=str(weights.path), layers={layer(0): "a", "nothing": "b"})
    with pytest.raises(CheckpointNotFound):
        caller.call("Open", path="/nowhere", layers={"nothing": "b"})
    assert daemon.leases() == 0
    assert daemon.status()["models"] == ()


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hostile_layer(daemon: Daemon, caller: Caller, weights: Weights, name: str) -> None:
    lease = caller.call("Open", path=str(weights.path), layers={layer(0): name})["lease_id"]
    caller.call("Wait", lease_id=lease)
    assert daemon.model(weights.name)["residency"][name] == "dram"
    with daemon.client() as client, client.open(weights.path) as model:
        assert model[layer(0)].tobytes() == weights.tensors[layer(0)]


def test_pins_are_counted_far(caller: Caller, weights: Weights) -> None:
    name = caller.call("Load", path=str(weights.path))["name"]
    for count in range(1, 50):
        assert caller.call("Pin", name=name)["pins"] == count
    with pytest.raises(Refused, match="pinned 49 times"):
        caller.call("Remove", name=name)
    for count in reversed(range(49)):
        assert caller.call("Unpin", name=name)["pins"] == count
    with pytest.raises(Refused):
        caller.call("Unpin", name=name)
