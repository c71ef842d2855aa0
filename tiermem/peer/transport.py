"""Transport: by which way weights come from another host's pool, and why that one.

Owns the RDMA device of a pool, which is opened when it is first asked for. Sends and receives nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tiermem import host
from tiermem.errors import TransportUnavailable
from tiermem.host import Capability
from tiermem.peer.address import Address

if TYPE_CHECKING:
    from tiermem.peer.rdma import Device

TCP, RDMA = "tcp", "rdma"
AUTO = "auto"

RETRY_S = 60.0
"""For so long a peer that RDMA failed with is read by TCP."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Transport:
    """The way that is taken. `reason` says why it is that one, and what the other would need."""

    name: str
    reason: str


def pyverbs() -> Capability:
    """Whether the module that RDMA goes by is installed; it is not imported."""
    if find_spec("pyverbs") is not None:
        return Capability(True, "installed")
    return Capability(False, "not installed; it is python3-pyverbs of Debian and others, or tiermem[rdma]")


class Transports:
    """Of one pool. `wanted`: AUTO, or TCP for that alone. Threads may share it."""

    def __init__(self, wanted: str = AUTO, root: Path = host.ROOT) -> None:
        self._wanted, self._root = wanted, root
        self._lock = threading.Lock()
        self._device: Device | None = None
        self._lacking: str | None = None  # None: nobody has looked
        self._failed: dict[Address, tuple[float, str]] = {}

    def own(self) -> Transport:
        """The best that this host can do."""
        try:
            return Transport(RDMA, f"by {self.device().name}, where the other end can")
        except TransportUnavailable as error:
            return Transport(TCP, str(error))

    def choose(self, address: Address, offered: bool) -> Transport:
        """For a peer that offers RDMA or does not."""
        own = self.own()
        with self._lock:
            at_s, why = self._failed.get(address, (0.0, ""))
        if own.name == TCP:
            return own
        if not offered:
            return Transport(TCP, "the peer offers no RDMA; `tiermem doctor` there says why")
        if why and time.monotonic() < at_s + RETRY_S:
            return Transport(TCP, f"RDMA failed: {why}")
        return Transport(RDMA, "both ends can")

    def fail(self, address: Address, error: Exception) -> None:
        """RDMA failed with that peer: it is read by TCP for a while."""
        with self._lock:
            self._failed[address] = (time.monotonic(), str(error))
        _log.warning("%s is read by TCP for %g s: RDMA failed: %s", address, RETRY_S, error)

    def device(self) -> Device:
        """This host's RDMA device. Raises TransportUnavailable, saying what lacks."""
        with self._lock:
            if self._device is None and self._lacking is None:
                try:
                    self._device = self._open()
                except TransportUnavailable as error:
                    self._lacking = str(error)
            if self._device is None:
                raise TransportUnavailable(self._lacking or "")
            return self._device

    def close(self) -> None:
        """Unpin what is still pinned; every connection by RDMA ends. Idempotent."""
        with self._lock:
            device, self._device, self._lacking = self._device, None, "the pool is closed"
        if device is not None:
            device.close()

    def _open(self) -> Device:
        if self._wanted == TCP:
            raise TransportUnavailable("--transport tcp is given")
        has = {"an RDMA device": host.rdma(self._root), "memory that may be pinned": host.memlock(self._root)}
        lacking = [need for need, found in (has | {"pyverbs": pyverbs()}).items() if not found.available]
        if lacking:
            raise TransportUnavailable(f"for RDMA this host lacks {', '.join(lacking)}")
        from tiermem.peer.rdma import Device

        return Device()
