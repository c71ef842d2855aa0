"""What of RDMA needs no device: what is no end and no region, how targets become READs, what lacks without pyverbs."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest

from tiermem.errors import ProtocolError, TransportUnavailable
from tiermem.peer.rdma import Device, End, Region, address_of
from tiermem.peer.rdma_pair import ACK_TIMEOUT, READ_BYTES, RETRIES
from tiermem.peer.rdma_reader import plan
from tiermem.peer.wire import MAX_EXTENT_BYTES

END = End(number=17, psn=5, gid=bytes(16), lid=0, mtu=4096)
REGION = Region(address=1 << 40, length=4096, key=7)


@pytest.mark.parametrize(
    "wrong",
    [{"number": 1 << 24}, {"number": -1}, {"psn": 1 << 24}, {"gid": bytes(15)}, {"lid": 1 << 16}, {"mtu": 1500}],
    ids=str,
)
def test_what_is_no_end(wrong: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        replace(END, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"length": 0}, {"address": -1}, {"address": (1 << 64) - 4095}, {"key": 1 << 32}, {"key": -1}], ids=str
)
def test_what_is_no_region(wrong: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        replace(REGION, **wrong)


def test_the_last_bytes_of_an_address_space_are_a_region() -> None:
    assert replace(REGION, address=(1 << 64) - 4096)


def test_targets_become_reads_in_order_that_leave_nothing_out() -> None:
    buffer = memoryview(bytearray(5 * READ_BYTES))
    base = address_of(buffer)
    lengths = (1, READ_BYTES, READ_BYTES + 1, 2 * READ_BYTES + 77)
    wants, at = [], 3
    for length in lengths:
        wants.append((9, 1000 + at, buffer[at : at + length]))
        at += length
    reads = list(plan(wants))
    assert [read.length for read in reads] == [1, READ_BYTES, READ_BYTES, 1, READ_BYTES, READ_BYTES, 77]
    assert [read.want for read in reads] == [0, 1, 2, 2, 3, 3, 3]
    assert [read.last for read in reads] == [True, True, False, True, False, False, True]
    assert all(read.target - base + 1000 == read.request.offset + read.at for read in reads)


@pytest.mark.parametrize("nbytes", [0, MAX_EXTENT_BYTES + 1])
def test_a_target_that_tcp_would_not_fill_either(nbytes: int) -> None:
    target = memoryview(bytearray(nbytes))
    with pytest.raises(ProtocolError, match=f"{nbytes} bytes at 0 of segment 0 were asked for"):
        list(plan([(0, 0, target)]))


def test_the_address_of_memory_that_cannot_be_written_to() -> None:
    buffer = memoryview(bytearray(100))
    assert address_of(buffer.toreadonly()[10:]) == np.frombuffer(buffer, np.uint8).ctypes.data + 10


def test_a_silent_peer_is_given_up_in_seconds() -> None:
    assert 3 < (1 + RETRIES) * 4.096e-6 * 2**ACK_TIMEOUT < 5
    assert RETRIES < 7  # which soft-RoCE takes for ever


def test_without_pyverbs_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(TransportUnavailable, match=r"pip install 'tiermem\[rdma\]', or Debian's python3-pyverbs"):
        Device()
    assert logging.getLogger().handlers == handlers
