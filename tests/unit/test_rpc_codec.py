"""Codec: every message survives the round trip, and nothing that is not a message gets through."""

from __future__ import annotations

import dataclasses
import random
import struct
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiermem import errors
from tiermem.rpc import codec, messages, replica_messages
from tiermem.rpc.messages import LoadRequest, OpenReply, SegmentGrant, StatusReply, WaitRequest
from tiermem.rpc.methods import METHODS
from tiermem.types import CheckpointFile, Extent, Manifest, SegmentInfo, TensorInfo

MESSAGES: list[Any] = [
    kind for module in (messages, replica_messages) for kind in vars(module).values() if dataclasses.is_dataclass(kind)
]
MESSAGES.remove(messages.StatusReply)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
for scalar, strategy in ((str, TEXT), (int, st.integers(-(2**63), 2**64 - 1)), (float, st.floats(-1e300, 1e300))):
    st.register_type_strategy(scalar, strategy)


def a_manifest() -> Manifest:
    """Two files, two segments, four tensors: a scalar, an empty one, a sub-byte dtype, a dtype of another format."""
    files = (
        CheckpointFile("/m/a.safetensors", 1, 2, 9000, 3, "ab", {"format": "pt"}),
        CheckpointFile("/m/b.safetensors", 1, 3, 5000, 4, "cd"),
    )
    tensors = (
        TensorInfo("scalar", "F32", (), 0, 100, Extent(0, 0, 4)),
        TensorInfo("empty", "BF16", (0, 7), 0, 104, Extent(0, 4096, 0)),
        TensorInfo("nibbles", "F4", (4, 3), 1, 8, Extent(1, 0, 6)),
        TensorInfo("blocks", "Q4_K", (256,), 1, 14, Extent(1, 4096, 144)),
    )
    return Manifest("/m", "ef" * 32, files, (SegmentInfo("head", 4100), SegmentInfo("layer.0", 4240)), tensors)


@given(st.one_of([st.from_type(kind) for kind in MESSAGES]))
def test_every_message_survives_the_round_trip(message: Any) -> None:
    assert codec.decode(type(message), codec.encode(message)) == message


@given(st.dictionaries(TEXT, PLAIN, max_size=5))
def test_a_status_body_is_plain_data_and_survives(body: dict[str, Any]) -> None:
    assert codec.decode(StatusReply, codec.encode(StatusReply(body))).body == body


def test_default_values_are_left_out_so_that_older_peers_accept_the_message() -> None:
    assert msgpack.unpackb(codec.encode(LoadRequest("/m"))) == {"path": "/m"}


@pytest.mark.parametrize(
    ("kind", "body", "complaint"),
    [
        (LoadRequest, {"path": "/m", "color": 1}, "LoadRequest has unknown fields: color"),
        (LoadRequest, {"name": "n"}, "LoadRequest.path is missing"),
        (LoadRequest, {"path": b"/m"}, "LoadRequest.path is bytes, not str"),
        (LoadRequest, {"path": None}, "LoadRequest.path is nil, not str"),
        (LoadRequest, {"path": "/m", "layers": {"a": 1}}, "LoadRequest.layers is int, not str"),
        (LoadRequest, [1], "LoadRequest is an array, not a map"),
        (messages.PinReply, {"pins": True}, "PinReply.pins is bool, not int"),
        (messages.PinReply, {"pins": 1.0}, "PinReply.pins is float, not int"),
        (WaitRequest, {"lease_id": "l", "timeout_s": True}, "WaitRequest.timeout_s is bool, not a number"),
        (WaitRequest, {"lease_id": "l", "timeout_s": float("nan")}, "timeout_s is nan, not a finite number"),
        (WaitRequest, {"lease_id": "l", "tensors": [0, "1"]}, r"WaitRequest.tensors\[1\] is str, not int"),
        (messages.WaitReply, {"ready": b"", "segments": [{"key": "k", "index": "0", "page_bytes": 1}]},
         r"WaitReply.segments\[0\].index is str, not int"),
        (messages.ImageCreateRequest, {"fingerprint": {"a": "b"}}, "ImageCreateRequest.tensors is missing"),
        (messages.ImageCreateRequest, {"fingerprint": {"a": None}, "tensors": []}, "fingerprint is nil, not str"),
        (messages.ImageCreateRequest, {"fingerprint": {}, "tensors": [{"name": "w", "dtype": "U8", "shape": [False]}]},
         r"ImageCreateRequest.tensors\[0\].shape\[0\] is bool, not int"),
        (messages.ImageCreateReply, {"draft": 1, "opened": {}}, "ImageCreateReply.draft is int, not bool"),
        (messages.PathsReply, {"paths": "/a"}, "PathsReply.paths is str, not an array"),
        (StatusReply, {"body": {"a": [{"b": msgpack.Timestamp(1)}]}}, "StatusReply.body holds Timestamp"),
        (StatusReply, {"body": {"a": msgpack.ExtType(5, b"x")}}, "extension type 5"),
    ],
)  # fmt: skip
def test_a_deviation_is_named_with_message_and_field(kind: type[Any], body: Any, complaint: str) -> None:
    with pytest.raises(errors.ProtocolError, match=complaint):
        codec.decode(kind, msgpack.packb(body))


def test_an_integer_may_stand_for_a_float() -> None:
    timeout = codec.decode(WaitRequest, msgpack.packb({"lease_id": "l", "timeout_s": 3})).timeout_s
    assert (timeout, type(timeout)) == (3.0, float)


def test_trailing_bytes_and_oversize_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(LoadRequest("/m"))
    with pytest.raises(errors.ProtocolError, match="LoadRequest is not msgpack"):
        codec.decode(LoadRequest, data + b"\0")
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(errors.ProtocolError, match=f"{len(data)} bytes"):
        codec.decode(LoadRequest, data)
    with pytest.raises(errors.ProtocolError, match=f"{len(data)} bytes"):
        codec.encode(LoadRequest("/m"))


@pytest.mark.parametrize("value", ["\udcff", object(), 1 << 64])
def test_what_has_no_wire_form_is_refused_when_it_is_sent(value: Any) -> None:
    with pytest.raises(errors.ProtocolError, match="LoadRequest cannot be encoded"):
        codec.encode(LoadRequest(value))


def decodes_or_refuses(kind: type[Any], data: bytes) -> None:
    with suppress(errors.ProtocolError):
        assert isinstance(codec.decode(kind, data), kind)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([method.request for method in METHODS.values()]), st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_protocol_errors(kind: type[Any], data: bytes) -> None:
    decodes_or_refuses(kind, data)


def test_mutated_messages_raise_nothing_but_protocol_errors() -> None:
    chance = random.Random(5)
    grants = tuple(SegmentGrant(f"k{i}", i, 1 << 21) for i in range(3))
    reply = codec.encode(OpenReply("l", "m", "n", b"bytes", grants, b"\1", (0, 1)))
    for _ in range(4000):
        data = bytearray(reply)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        decodes_or_refuses(OpenReply, bytes(data[: chance.randint(1, len(data))]))
        decodes_or_refuses(OpenReply, bytes(data))


@pytest.mark.parametrize("data", [b"\x91" * 100_000 + b"\xc0", b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b""])
def test_bombs_are_refused(data: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        codec.decode(StatusReply, data)


def test_deeply_nested_plain_data_is_decoded_or_refused_without_exhausting_the_stack() -> None:
    decodes_or_refuses(StatusReply, b"\x81\xa4body\x81\xa1a" + b"\x91" * 505 + b"\xc0")


@pytest.mark.parametrize("kind", errors.BY_CODE.values())
def test_an_error_keeps_its_class_and_text(kind: type[errors.TiermemError]) -> None:
    failure = codec.failure_of(kind("what; do this"))
    error = codec.error_of(codec.decode(messages.Failure, codec.encode(failure)))
    assert (type(error), str(error)) == (kind, "what; do this")


def test_an_error_from_a_newer_pool_is_a_plain_one_and_long_text_is_cut() -> None:
    assert type(codec.error_of(messages.Failure("new-code", "text"))) is errors.TiermemError
    text = codec.failure_of(errors.Refused("ä\udcff" * 4000)).message
    assert len(text.encode()) <= codec.MAX_ERROR_BYTES
    assert text.startswith("ä?ä?")


def test_a_manifest_survives_the_round_trip() -> None:
    manifest = a_manifest()
    decoded = codec.decode_manifest(codec.encode_manifest(manifest))
    assert decoded == manifest
    assert hash(decoded.tensors[0]) == hash(manifest.tensors[0])
    assert decoded.by_name == manifest.by_name
    empty = Manifest("/e", "00", (), (), ())
    assert codec.decode_manifest(codec.encode_manifest(empty)) == empty


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("length", u64(4, 0, 6), "manifest.length holds 24 bytes"),
        ("length", u64(4, 0, 6, 144) + b"\0", "manifest.length holds 33 bytes"),
        ("length", u64(8, 0, 6, 144), r"scalar of F32\[\] has 8 bytes"),
        ("length", u64(4, 0, 6, 145), "blocks is misplaced"),
        ("offset", u64(0, 4096, 0, 8192), "blocks is misplaced"),
        ("offset", u64(0, 4096, 1, 4096), "nibbles is misplaced"),
        ("offset", u64(0, 4096, 0, 2**64 - 4096), "which no file can hold"),
        ("segment", u64(0, 0, 1, 2), "manifest.segment refers to number 2 of 2"),
        ("file", u64(0, 0, 2, 1), "manifest.file refers to number 2 of 2"),
        ("file_offset", u64(100, 104, 8, 4900), "blocks lies beyond the end of file 1"),
        ("dtype", bytes((0, 1, 2, 9)), "manifest.dtype refers to number 9 of 4"),
        ("dtype", bytes((0, 1, 2)), "manifest.dtype has 3 entries for 4 tensors"),
        ("rank", bytes((0, 2, 2)), "manifest.rank has 3 entries"),
        ("rank", bytes((0, 2, 2, 255)), "manifest.dims holds 40 bytes, not 8 for each of 259"),
        ("dims", u64(0, 7, 4, 4, 256), "nibbles of F4"),
        ("names", ("scalar", "empty", "nibbles", "scalar"), "has a name twice"),
        ("names", ("scalar", "empty", "nibbles"), "manifest.dtype has 4 entries for 3 tensors"),
        ("segments", ({"layer": "head", "length": 4100}, {"layer": "x", "length": -1}), "negative length"),
        ("identity", 5, "ManifestColumns.identity is int"),
    ],
)  # fmt: skip
def test_a_hostile_column_is_refused(column: str, value: Any, complaint: str) -> None:
    columns = msgpack.unpackb(codec.encode_manifest(a_manifest()))
    with pytest.raises(errors.ProtocolError, match=complaint):
        codec.decode_manifest(msgpack.packb(columns | {column: value}))


def test_a_mutated_manifest_raises_nothing_but_protocol_errors() -> None:
    chance = random.Random(7)
    encoded = codec.encode_manifest(a_manifest())
    for _ in range(4000):
        data = bytearray(encoded)
        data[chance.randrange(len(data))] = chance.randrange(256)
        with suppress(errors.ProtocolError):
            codec.decode_manifest(bytes(data))


@pytest.mark.parametrize("change", [{"shape": (-1,)}, {"shape": (1,) * 256}, {"file": 1 << 64}])
def test_a_manifest_that_fits_no_column_is_refused_when_it_is_sent(change: dict[str, Any]) -> None:
    manifest = a_manifest()
    broken = dataclasses.replace(manifest.tensors[0], **change)
    with pytest.raises(errors.ProtocolError, match="the manifest of /m cannot be encoded"):
        codec.encode_manifest(dataclasses.replace(manifest, tensors=(broken,)))
