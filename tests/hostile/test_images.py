"""What no engine would ask of images: each call gets its own error, and nothing of what it asked for stays."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgpack
import pytest

from tests.hostile.test_rpc import NAMES, Caller
from tests.integration.child import eventually
from tests.integration.daemon import Daemon
from tests.unit.paint import PAGES, TENSORS, drawn, fill, painted, prints, sealed
from tiermem.errors import (
    CapacityError,
    DeadlineExceeded,
    FingerprintMismatch,
    ImageNotFound,
    ModelNotFound,
    ProtocolError,
    Refused,
    TiermemError,
)
from tiermem.rpc import codec
from tiermem.rpc.codec import encode
from tiermem.rpc.messages import ImageCreateRequest
from tiermem.types import PAGE_BYTES, ImageTensor

W = {"name": "w", "dtype": "U8", "shape": [1]}


@pytest.fixture
def caller(daemon: Daemon) -> Iterator[Caller]:
    """A session of its own; after its end the pool is empty and makes images."""
    with Caller(daemon) as caller:
        yield caller
    assert_empty(daemon)
    with daemon.client() as client:
        with sealed(client, name="sound") as image:
            assert painted(image)
        client.remove("sound")


def assert_empty(daemon: Daemon) -> None:
    """No session is left that holds anything, nor what it held."""
    eventually(lambda: daemon.leases() == 0, "all leases ended")
    with daemon.client() as client:
        for model in client.status()["models"]:
            client.remove(model["name"])
    status = daemon.status()
    assert status["tiers"][0]["used_bytes"] == status["pool"]["quarantined_loads"] == 0
    assert list(daemon.segments.glob("*")) == []
    assert list((daemon.state / "catalog").glob("[!.]*")) == []


def create(caller: Caller, seed: object = 0, **fields: object) -> dict[str, Any]:
    """The reply to ImageCreate; its `opened` is the lease."""
    return dict(caller.call("ImageCreate", **({"fingerprint": prints(seed), "tensors": [W]} | fields)))


CREATES: Mapping[str, tuple[dict[str, object], type[TiermemError], str]] = {
    "no fields": ({"fingerprint": {}}, ProtocolError, "1 to 64 fields, this one 0"),
    "65 fields": ({"fingerprint": {str(i): "" for i in range(65)}}, ProtocolError, "this one 65"),
    "a million fields": ({"fingerprint": {str(i): "" for i in range(1_000_000)}}, ProtocolError, "this one 1000000"),
    "a long value": ({"fingerprint": {"a": "x" * 50_000_000}}, ProtocolError, "more than 4096 characters"),
    "a long field": ({"fingerprint": {"x" * 50_000_000: ""}}, ProtocolError, "more than 4096 characters"),
    "a number": ({"fingerprint": {"a": 1}}, ProtocolError, r"ImageCreateRequest\.fingerprint is int"),
    "a list": ({"fingerprint": [["a", "b"]]}, ProtocolError, r"fingerprint is an array"),
    "no tensors": ({"tensors": []}, ProtocolError, "without tensors"),
    "a tensor that is text": ({"tensors": ["w"]}, ProtocolError, r"tensors\[0\] is str"),
    "no shape": ({"tensors": [{"name": "w", "dtype": "U8"}]}, ProtocolError, r"tensors\[0\]\.shape is missing"),
    "a shape of floats": ({"tensors": [W | {"shape": [1.0]}]}, ProtocolError, r"shape\[0\] is float"),
    "a shape of truths": ({"tensors": [W | {"shape": [True]}]}, ProtocolError, r"shape\[0\] is bool"),
    "an offset": ({"tensors": [W | {"offset": 0}]}, ProtocolError, "unknown fields: offset"),
    "a name twice": ({"tensors": [W, W]}, ProtocolError, "tensor name twice"),
    "an unknown dtype": ({"tensors": [W | {"dtype": "Q4_K"}]}, ProtocolError, "unknown dtype 'Q4_K'"),
    "a negative shape": ({"tensors": [W | {"shape": [-1, -1]}]}, ProtocolError, r"has the shape \[-1, -1\]"),
    "part of a byte": ({"tensors": [W | {"dtype": "F4"}]}, ProtocolError, "ends within a byte"),
    "many dimensions": ({"tensors": [W | {"shape": [1 << 62] * 1_000_000}]}, ProtocolError, "1000000 dimensions"),
    "a long dimension": ({"tensors": [W | {"shape": [0, (1 << 64) - 1]}]}, ProtocolError, "has the shape"),
    "an absurd size": ({"tensors": [W | {"shape": [1 << 62] * 255}]}, ProtocolError, "of 255 dimensions"),
    "all of 63 bits": ({"tensors": [W | {"shape": [(1 << 63) - 1]}]}, CapacityError, "all memory is 64.0 MiB"),
    "a petabyte": ({"tensors": [W | {"shape": [1 << 50]}]}, CapacityError, "needs 1024.0 TiB, all memory is"),
    "a page too many": ({"tensors": [W | {"shape": [64 << 20 | 1]}]}, CapacityError, "needs 66.0 MiB"),
    "many layers": (
        {"tensors": [W | {"name": str(i), "layer": str(i), "shape": []} for i in range(100_000)]},
        CapacityError, "needs 195.3 GiB",
    ),
    "metadata that is no text": ({"metadata": {"a": b"x"}}, ProtocolError, "metadata is bytes"),
    "a reply that is too large": (
        {"metadata": {"a": "x" * 65_000_000}, "tensors": [W | {"name": str(i), "shape": [0]} for i in range(50_000)]},
        ProtocolError, "ManifestColumns has 67",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "error", "words"), CREATES.values(), ids=CREATES)
def test_what_is_no_image(
    daemon: Daemon, caller: Caller, fields: dict[str, object], error: type[TiermemError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        create(caller, **fields)
    assert len(str(caught.value).encode()) <= codec.MAX_ERROR_BYTES
    # While its session lives on.
    eventually(lambda: daemon.leases() == 0, "no lease is left")
    assert daemon.status()["models"] == ()


def test_what_the_client_refuses_to_send(daemon: Daemon) -> None:
    with daemon.client() as client:
        for fields, tensors in (
            ({"a": "\udcff"}, TENSORS), (prints(), [ImageTensor("\udcff", "U8", (1,))]),
            (prints(), [ImageTensor("w", "U8", (1 << 64,))]),
        ):  # fmt: skip
            with pytest.raises(ProtocolError, match="cannot be encoded"):
                client.create_image(fields, tensors)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_hostile_name(daemon: Daemon, caller: Caller, name: str) -> None:
    for method in ("ImageOpen", "Paths"):
        fields: dict[str, object] = {"name": name}
        with pytest.raises(ModelNotFound):
            caller.call(method, **(fields | ({"fingerprint": prints()} if method == "ImageOpen" else {})))
    tensors = [W | {"name": name, "layer": name}]
    reply = create(caller, name=name, tensors=tensors, fingerprint={name[:4000]: name[:96]}, metadata={name: name})
    opened = reply["opened"]
    assert reply["draft"]
    assert opened["name"] == (name or codec.decode_manifest(opened["manifest"]).path)
    caller.call("ImageSeal", lease_id=opened["lease_id"])
    found = caller.call("ImageOpen", fingerprint={name[:4000]: name[:96]}, name=opened["name"])
    assert found["manifest"] == opened["manifest"]
    assert daemon.model(opened["name"])["residency"] == {name: "dram"}
    assert len(caller.call("Paths", name=opened["name"])["paths"]) == 1


def access(fd: int) -> int:
    """How a descriptor may be used; closes it."""
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    finally:
        os.close(fd)


def test_only_who_fills_may_write_and_only_until_the_seal(daemon: Daemon, caller: Caller) -> None:
    with Caller(daemon) as other:
        own = create(caller)["opened"]["lease_id"]
        reply = create(other)
        assert not reply.get("draft")
        theirs = reply["opened"]["lease_id"]
        assert access(caller.descriptors.fetch(own, [0])[0]) == os.O_RDWR
        assert access(other.descriptors.fetch(theirs, [0])[0]) == os.O_RDONLY
        for index in (1, 1 << 40, -1):
            with pytest.raises(TiermemError):
                caller.descriptors.fetch(own, [index])
        caller.call("ImageSeal", lease_id=own)
        assert access(caller.descriptors.fetch(own, [0])[0]) == os.O_RDONLY


def test_seals_that_are_nobody_s_to_give(daemon: Daemon, caller: Caller) -> None:
    with Caller(daemon) as other:
        own = create(caller)["opened"]["lease_id"]
        for foreign in (own, "", "0" * 16, "x" * 1000):
            with pytest.raises(Refused, match="not held by this client"):
                other.call("ImageSeal", lease_id=foreign)
        waiting = create(other)["opened"]["lease_id"]
        with pytest.raises(Refused, match="not of an image that is being filled"):
            other.call("ImageSeal", lease_id=waiting)
        (status,) = daemon.status()["models"]
        assert (status["state"], status["ready_bytes"]) == ("draft", 0)
        assert caller.call("ImageSeal", lease_id=own) == {}
        for lease in (own, waiting):
            with pytest.raises(Refused, match="not of an image that is being filled"):
                (caller if lease == own else other).call("ImageSeal", lease_id=lease)
        caller.call("Release", lease_id=own)
        with pytest.raises(Refused, match="not held by this client"):
            caller.call("ImageSeal", lease_id=own)
        assert other.call("Wait", lease_id=waiting)["ready"] == b"\x01"


def test_a_draft_is_waited_for_as_long_as_was_asked(daemon: Daemon, caller: Caller) -> None:
    opened = create(caller)["opened"]
    lease = opened["lease_id"]
    with daemon.client() as client, client.open(opened["name"]) as model:
        for names in (None, ["w"]):
            with pytest.raises(DeadlineExceeded, match="not loaded within 50"):
                model.wait(names, timeout_s=0.05)
        for timeout_s in (0, 0.05):
            with pytest.raises(DeadlineExceeded, match="not loaded within"):
                client.create_image(prints(), TENSORS, timeout_s=timeout_s)
        eventually(lambda: daemon.leases() == 2, "who gave up waiting holds no lease")
    with pytest.raises(ProtocolError, match="none is number 1"):
        caller.call("Wait", lease_id=lease, tensors=[1])


def test_what_is_done_to_models_is_refused_for_drafts(daemon: Daemon, caller: Caller) -> None:
    name = create(caller, name="mine")["opened"]["name"]
    for method in ("Evict", "Remove"):
        with pytest.raises(Refused, match="is leased by process"):
            caller.call(method, name=name)
    with pytest.raises(Refused, match="wait until the model is loaded"):
        caller.call("Paths", name=name)
    # A pin is a promise about what is in memory; it does not keep what nobody fills.
    assert caller.call("Pin", name=name)["pins"] == 1


def test_a_session_that_ends_takes_all_its_drafts_along(daemon: Daemon, caller: Caller) -> None:
    with Caller(daemon) as other:
        for seed in range(8):
            assert create(other, seed, tensors=[W, W | {"name": "layers.1.w"}])["draft"]
        with pytest.raises(CapacityError):
            create(caller, tensors=[W | {"shape": [50 << 20]}], fingerprint={"a": "b"})
        assert daemon.status()["tiers"][0]["used_bytes"] == 16 * PAGE_BYTES
    eventually(lambda: daemon.leases() == 0, "they ended")
    assert daemon.status()["models"] == ()


def test_an_image_of_a_name_is_not_given_for_other_fields(daemon: Daemon, caller: Caller) -> None:
    with daemon.client() as client:
        sealed(client, name="image").close()
        for fields in ({"a": "b"}, prints() | {"rank": "1"}, prints() | {"": ""}, prints(rank="0 ")):
            with pytest.raises(FingerprintMismatch, match="image 'image' does not fit: "):
                caller.call("ImageOpen", fingerprint=fields, name="image")
            with pytest.raises(ImageNotFound):
                caller.call("ImageOpen", fingerprint=fields)
        long = {str(i): "x" * 4000 for i in range(64)}
        with pytest.raises(ImageNotFound, match="no image has this fingerprint") as caught:
            caller.call("ImageOpen", fingerprint=long)
        assert len(str(caught.value).encode()) <= codec.MAX_ERROR_BYTES
        with pytest.raises(ProtocolError, match="1 to 64 fields"):
            caller.call("ImageOpen", fingerprint={})


def test_a_lease_of_a_draft_cannot_be_announced_into_filling_it(daemon: Daemon, caller: Caller) -> None:
    identity = codec.decode_manifest(create(caller)["opened"]["manifest"]).identity
    with Caller(daemon) as other:
        announced = {"lease_id": "brought", "model_id": identity}
        other.call("Attach", protocol=1, pid=1, leases=[announced])
        for call in (
            lambda: other.call("ImageSeal", lease_id="brought"),
            lambda: access(other.descriptors.fetch("brought", [0])[0]) == os.O_RDWR or 1 / 0,
        ):
            with pytest.raises((Refused, ZeroDivisionError)):
                call()
    assert [model["state"] for model in daemon.status()["models"]] == ["draft"]


def test_tensors_of_a_second_creator_are_not_believed(daemon: Daemon) -> None:
    """The fingerprint says what the bytes are, and who came first how they lie."""
    with daemon.client() as client:
        with drawn(client) as draft:
            fill(draft)
            image = draft.seal()
        again = client.create_image(prints(), [ImageTensor("other", "U8", (5,))])
        assert list(again) == list(image)
        assert daemon.status()["tiers"][0]["used_bytes"] == PAGES * PAGE_BYTES
        image.close()
        again.close()
    assert_empty(daemon)


def test_a_request_that_is_cut(caller: Caller) -> None:
    body = encode(ImageCreateRequest(prints(), TENSORS, "image"))
    for length in range(0, len(body), 7):
        with pytest.raises(ProtocolError, match="ImageCreateRequest"):
            caller.send("ImageCreate", body[:length])
    assert msgpack.unpackb(caller.send("ImageCreate", body), use_list=False)["draft"]
