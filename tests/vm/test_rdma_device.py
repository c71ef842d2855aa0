"""An RDMA device that cannot be had, and why: each lack is told in words that name it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from tests.integration.child import Child
from tests.vm.rdma_owner import DEADLINE_S
from tiermem import _native
from tiermem.errors import Closed, TransportUnavailable
from tiermem.peer.rdma import Device
from tiermem.peer.rdma_pair import QueuePair

pytestmark = pytest.mark.rxe

LIMITED = """
import os, resource
from tiermem import _native
from tiermem.errors import TransportUnavailable
from tiermem.peer.rdma import Device
segment = _native.Segment.create(-1, "limited", 4 << 20)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
os.setuid(65534)
try:
    Device().register(segment.buffer(), remote_read=False)
except TransportUnavailable as error:
    print(error, flush=True)
"""


def as_nobody() -> str:
    """What a user who may lock 1 MiB is told when 4 MiB are to be pinned."""
    path = f"PYTHONPATH={os.environ['PYTHONPATH']}"
    with Child(["-c", LIMITED], prefix=["env", path]) as child:
        return child.line(DEADLINE_S)


def test_what_lacks_is_told() -> None:
    assert "this user may lock 1.0 MiB, see `ulimit -l`" in as_nobody()
    os.chmod("/dev/infiniband/uverbs0", 0o600)
    try:
        assert as_nobody().startswith("rxe0 cannot be opened: ")
    finally:
        os.chmod("/dev/infiniband/uverbs0", 0o666)
    with pytest.raises(TransportUnavailable, match="this host has no RDMA device mlx5_0"):
        Device("mlx5_0")


def test_a_port_that_is_down() -> None:
    links = json.loads(subprocess.run(["rdma", "-j", "link"], capture_output=True, check=True).stdout)
    network: Any = links[0]["netdev"]
    subprocess.run(["ip", "link", "set", network, "down"], check=True)
    try:
        with pytest.raises(TransportUnavailable, match="no port of rxe0 is active"):
            Device()
    finally:
        subprocess.run(["ip", "link", "set", network, "up"], check=True)


def test_a_closed_device_gives_nothing() -> None:
    device = Device("rxe0")
    segment = _native.Segment.create(-1, "mapped", 4 << 20)
    pair = QueuePair(device.own, 1)
    registration = device.register(segment.buffer(), remote_read=False)
    device.close()
    device.close()
    pair.close()
    registration.close()
    with pytest.raises(Closed):
        device.register(segment.buffer(), remote_read=False)
    with pytest.raises(Closed):
        QueuePair(device.own, 1)
