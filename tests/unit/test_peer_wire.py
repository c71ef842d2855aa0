"""Frames of a data connection: what is packed is unpacked, and no other bytes are taken for it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import AccessDenied, DaemonUnreachable, DeadlineExceeded, ProtocolError, Refused
from tiermem.peer import wire
from tiermem.peer.wire import Answer, Request, Status

TOKEN = bytes(range(32))
REQUEST = Request(3, 1 << 40, 4 << 20)

requests = st.builds(
    Request,
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(1, wire.MAX_EXTENT_BYTES),
)


def flips(frame: bytes) -> Iterator[bytes]:
    """The frame with each of its bits turned, one at a time."""
    for bit in range(8 * len(frame)):
        turned = bytearray(frame)
        turned[bit // 8] ^= 1 << bit % 8
        yield bytes(turned)


@given(requests)
def test_request_comes_back(request: Request) -> None:
    frame = wire.pack_request(request)
    assert len(frame) == wire.REQUEST_BYTES
    assert wire.unpack_request(frame) == request


@pytest.mark.parametrize("length", [0, wire.MAX_EXTENT_BYTES + 1, (1 << 64) - 1])
def test_length_out_of_bounds_is_refused_at_both_ends(length: int) -> None:
    with pytest.raises(ProtocolError, match=str(length)):
        wire.pack_request(Request(0, 0, length))
    with pytest.raises(ProtocolError, match=str(length)):
        wire.unpack_request(struct.pack("<IQQ", 0, 0, length))


@pytest.mark.parametrize(
    "request_", [Request(-1, 0, 1), Request(1 << 32, 0, 1), Request(0, -1, 1), Request(0, 1 << 64, 1)]
)
def test_numbers_that_no_segment_has(request_: Request) -> None:
    with pytest.raises(ProtocolError):
        wire.pack_request(request_)


def test_hello_comes_back_and_no_bit_of_it_may_differ() -> None:
    frame = wire.pack_hello(TOKEN)
    assert wire.unpack_hello(frame) == TOKEN
    for flipped in flips(frame):
        try:
            assert wire.unpack_hello(flipped) != TOKEN
        except ProtocolError:
            assert flipped[:8] != frame[:8]
        else:
            assert flipped[:8] == frame[:8]


def test_token_has_32_bytes() -> None:
    with pytest.raises(ProtocolError, match="31"):
        wire.pack_hello(TOKEN[:31])


@pytest.mark.parametrize(
    ("frame", "unpack"),
    [
        (wire.pack_hello(TOKEN), wire.unpack_hello),
        (wire.pack_request(REQUEST), wire.unpack_request),
        (wire.pack_answer(Answer(Status.OK, 3, 1 << 40, 4 << 20)), lambda frame: wire.unpack_answer(frame, REQUEST)),
    ],
    ids=["hello", "request", "answer"],
)
def test_frames_have_one_size(frame: bytes, unpack: object) -> None:
    assert callable(unpack)
    for cut in [*(frame[:n] for n in range(len(frame))), frame + b"\0"]:
        with pytest.raises(ProtocolError, match=str(len(cut))):
            unpack(cut)


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_an_error(frame: bytes) -> None:
    for unpack in (wire.unpack_hello, wire.unpack_request, lambda frame: wire.unpack_answer(frame, REQUEST)):
        with suppress(ProtocolError):
            unpack(frame)


def test_answer_is_to_what_was_asked() -> None:
    frame = wire.pack_answer(Answer(Status.OK, 3, 1 << 40, 4 << 20))
    assert wire.unpack_answer(frame, REQUEST).status is Status.OK
    for other in (Request(4, 1 << 40, 4 << 20), Request(3, 0, 4 << 20), Request(3, 1 << 40, 1 << 20)):
        with pytest.raises(ProtocolError):
            wire.unpack_answer(frame, other)


@pytest.mark.parametrize("answer", [Answer(Status.LATER, 3, 1 << 40), Answer(Status.OK, 3, 1 << 40, 4 << 20)])
def test_no_turned_bit_makes_an_answer_of_bytes(answer: Answer) -> None:
    for flipped in flips(wire.pack_answer(answer)):
        try:
            assert wire.unpack_answer(flipped, REQUEST).error is not None
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    ("status", "length", "good"),
    [(0, 4 << 20, True), (0, 0, False), (1, 0, True), (1, 1, False), (2, 512, True), (2, 513, False), (5, 0, False)],
)
def test_length_fits_the_status(status: int, length: int, good: bool) -> None:
    frame = struct.pack("<IIQQ", status, 3, 1 << 40, length)
    if good:
        assert wire.unpack_answer(frame, REQUEST).length == length
        return
    with pytest.raises(ProtocolError):
        wire.unpack_answer(frame, REQUEST)


@pytest.mark.parametrize(
    ("status", "error"),
    [(Status.REFUSED, Refused), (Status.DENIED, AccessDenied), (Status.MALFORMED, ProtocolError), (Status.OK, None)],
)
def test_refusals_are_errors(status: Status, error: type[Exception] | None) -> None:
    assert Answer(status).error is error


@given(st.text(max_size=600))
def test_text_of_a_refusal_is_bounded_and_printable(text: str) -> None:
    frame = wire.pack_refusal(Status.REFUSED, text, 3, 1 << 40)
    answer = wire.unpack_answer(frame[: wire.ANSWER_BYTES], REQUEST)
    body = frame[wire.ANSWER_BYTES :]
    assert answer.length == len(body) <= wire.MAX_TEXT_BYTES
    shown = wire.unpack_text(body)
    assert shown.isprintable()
    if text.isascii() and text.isprintable():
        assert shown == text[: wire.MAX_TEXT_BYTES]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_receive_says_how_far_it_came(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    other.sendall(b"abc")
    other.close()
    target = bytearray(5)
    with pytest.raises(DaemonUnreachable, match="it: 3 of 5 bytes"):
        wire.receive(one, memoryview(target), 5.0, "it")
    assert target == b"abc\0\0"


def test_a_byte_now_and_then_is_no_progress(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    wire.set_timeout(one, 0.2)
    other.sendall(bytes(1000))
    with pytest.raises(DeadlineExceeded, match="1000 of 100000 bytes came"):
        wire.receive(one, memoryview(bytearray(100_000)), 0.2, "it")


def test_pace_counts_what_moved_since_the_last_64_kib() -> None:
    pace = wire.Pace(0.0)
    pace.moved(wire.PROGRESS_BYTES)
    with pytest.raises(TimeoutError):
        pace.moved(wire.PROGRESS_BYTES - 1)
