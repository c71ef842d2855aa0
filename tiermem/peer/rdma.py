"""RDMA: a device by which other hosts read this one's memory, and this one theirs, without a process at the far end.

Owns the open device, and in it domains and registrations; queue pairs are in rdma_pair. Never decides who may read what
(the exporter does), nor which bytes come next (the reader does).

What the kernel allows shapes it: a memory window can be bound only on memory that is pinned for writing, and sealed
segments are mapped for reading alone. So what a key is good for is drawn by protection domains instead: the queue pairs
of one can use the keys of the registrations in it, and the device refuses them all others.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from tiermem.errors import Closed, ProtocolError, TransportUnavailable
from tiermem.units import format_bytes

MTUS = {128 << code: code for code in range(1, 6)}
"""Bytes of a packet -> the number of verbs.h."""

REMOTE_READ, _LOCAL_WRITE = 1 << 2, 1 << 0
_TRANSPORT_IB, _PORT_ACTIVE, _LINK_ETHERNET, _ROCE_V2 = 0, 4, 2, 2
"""Numbers of infiniband/verbs.h: where pyverbs has names for them depends on its release."""

_GID_BYTES = 16
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"
_LINK_LOCAL = b"\xfe\x80"


@dataclass(frozen=True, slots=True)
class End:
    """One end of a connection, as the other must know it: the queue pair's number, the first packet's, where the port
    is (`gid`, and on InfiniBand `lid`), the bytes of its packets. Raises ProtocolError for what no device has."""

    number: int
    psn: int
    gid: bytes
    lid: int
    mtu: int

    def __post_init__(self) -> None:
        whole = 0 <= self.number < 1 << 24 and 0 <= self.psn < 1 << 24 and 0 <= self.lid < 1 << 16
        if not (whole and len(self.gid) == _GID_BYTES and self.mtu in MTUS):
            raise ProtocolError(f"{self} is no end of an RDMA connection")


@dataclass(frozen=True, slots=True)
class Region:
    """`length` bytes at `address` of the other end's process, which `key` lets this one read. Raises ProtocolError."""

    address: int
    length: int
    key: int

    def __post_init__(self) -> None:
        if not (
            0 < self.length <= 1 << 64 and 0 <= self.address <= (1 << 64) - self.length and 0 <= self.key < 1 << 32
        ):
            raise ProtocolError(f"{self} is no memory")


class Registration:
    """Memory that is pinned and that the device may use, until whoever shares it has closed it."""

    def __init__(self, domain: Domain, buffer: memoryview, remote_read: bool) -> None:
        from pyverbs.mr import MR

        self.nbytes, self.address = buffer.nbytes, address_of(buffer)
        self.shares = 0
        self._domain, self._buffer, self._remote_read = domain, buffer, remote_read  # the buffer keeps it mapped
        access = REMOTE_READ if remote_read else _LOCAL_WRITE
        with told(f"cannot pin {format_bytes(self.nbytes)} for {domain.device.name}"):
            self._region: Any = MR(domain.verbs, self.nbytes, access, address=self.address)
        self.local_key: int = self._region.lkey
        self.region = Region(self.address, self.nbytes, self._region.rkey)

    @property
    def kind(self) -> tuple[int, int, bool]:
        return self.address, self.nbytes, self._remote_read

    def close(self) -> None:
        """Give back one share; with the last one the memory is unpinned, and the device refuses its keys."""
        self._domain.give_back(self)

    def unpin(self) -> None:
        """Whoever shares it. Idempotent."""
        self._region.close()


class Domain:
    """Queue pairs and what they can use. Made by its device."""

    def __init__(self, device: Device) -> None:
        from pyverbs.pd import PD

        self.device = device
        self._registrations: dict[tuple[int, int, bool], Registration] = {}
        with told(f"{device.name} gives no further protection domain"):
            self.verbs: Any = PD(device.verbs)

    def register(self, buffer: memoryview, *, remote_read: bool) -> Registration:
        """A share in the registration of this memory: to be read from afar, or else to be written to by our own READs.
        Close it. Raises TransportUnavailable where it cannot be pinned."""
        with self.device.lock:
            self.device.check()
            kind = (address_of(buffer), buffer.nbytes, remote_read)
            registration = self._registrations.get(kind)
            if registration is None:
                registration = self._registrations[kind] = Registration(self, buffer, remote_read)
            registration.shares += 1
            return registration

    def give_back(self, registration: Registration) -> None:
        with self.device.lock:
            registration.shares -= 1
            if registration.shares == 0:
                self._registrations.pop(registration.kind, None)
                registration.unpin()

    def close(self) -> None:
        """With it go its queue pairs and registrations."""
        with self.device.lock:
            self._registrations.clear()
            self.verbs.close()


@dataclass(frozen=True, slots=True)
class Port:
    """An active port. `gid` number `gid_index` is how others find it; `mtu`: bytes of its packets."""

    number: int
    ethernet: bool
    gid: bytes
    gid_index: int
    lid: int
    mtu: int


class Device:
    """An open device, by its first port that is active. All threads may use it."""

    def __init__(self, name: str | None = None) -> None:
        """The device of that name, or the first one that can be had. Raises TransportUnavailable, saying what lacks."""
        _import_pyverbs()
        self.lock = threading.RLock()
        self.verbs, self.port = self._open(name)
        self.name: str = self.verbs.name
        self.closed = False
        self.own = Domain(self)
        """Of this device's own readers."""

    def domain(self) -> Domain:
        """A new one; the caller closes it."""
        with self.lock:
            self.check()
            return Domain(self)

    def register(self, buffer: memoryview, *, remote_read: bool) -> Registration:
        """As `Domain.register`, for this device's own readers."""
        return self.own.register(buffer, remote_read=remote_read)

    def check(self) -> None:
        """Raises Closed."""
        if self.closed:
            raise Closed(f"the RDMA device {self.name} is closed")

    def close(self) -> None:
        """End every queue pair and unpin all memory. Idempotent."""
        with self.lock:
            self.closed = True
            self.verbs.close()

    def _open(self, name: str | None) -> tuple[Any, Port]:
        from pyverbs.device import Context, get_device_list

        reasons = []
        for found in get_device_list():
            each = found.name.decode()
            if name not in (None, each):
                continue
            if found.transport_type != _TRANSPORT_IB:
                reasons.append(f"{each} has no reliable connections of InfiniBand or RoCE")
                continue
            try:
                with told(f"{each} cannot be opened", "; may this user read and write /dev/infiniband/uverbs*?"):
                    verbs = Context(name=each)
                    port = self._active_port(verbs)
            except TransportUnavailable as error:
                reasons.append(str(error))
                continue
            if port is not None:
                return verbs, port
            reasons.append(f"no port of {each} is active; see `rdma link`")
            verbs.close()
        wanted = "RDMA device" if name is None else f"RDMA device {name}"
        raise TransportUnavailable("; ".join(reasons) or f"this host has no {wanted}; see `rdma link`")

    def _active_port(self, verbs: Any) -> Port | None:
        ports = verbs.query_device().phys_port_cnt
        for number in range(1, ports + 1):
            port = verbs.query_port(number)
            if port.state != _PORT_ACTIVE:
                continue
            ethernet = port.link_layer == _LINK_ETHERNET
            entries = (e for e in verbs.query_gid_table(port.gid_tbl_len * ports) if e.port_num == number)
            gids = [(bytes.fromhex(e.gid_str().replace(":", "")), e.gid_index, e.gid_type) for e in entries]
            usable = [(gid, at) for gid, at, kind in gids if kind == _ROCE_V2 or not ethernet]
            if usable:
                gid, at = max(usable, key=lambda each: (_rank(each[0]), -each[1]))
                return Port(number, ethernet, gid, at, port.lid, 128 << port.active_mtu)
        return None


def address_of(buffer: memoryview) -> int:
    """Where the bytes of a buffer are; it must be contiguous."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address


def _rank(gid: bytes) -> int:
    """Of a port's addresses the one of IPv4 is routed wherever its network is, a link-local one nowhere."""
    return 2 if gid.startswith(_MAPPED_IPV4) else 0 if gid.startswith(_LINK_LOCAL) else 1


def _import_pyverbs() -> None:
    """Raises TransportUnavailable."""
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)  # else it would set up logging for the whole process
    try:
        import_module("pyverbs.device")
    except ImportError as error:
        raise TransportUnavailable(
            f"pyverbs cannot be imported ({error}); pip install 'tiermem[rdma]', or Debian's python3-pyverbs"
        ) from None
    finally:
        root.removeHandler(quiet)


@contextmanager
def told(what: str, advice: str = "") -> Iterator[None]:
    """Raise what pyverbs raises as TransportUnavailable."""
    from pyverbs.pyverbs_error import PyverbsError

    try:
        yield
    except PyverbsError as error:
        number = getattr(error, "error_code", -1)
        reason = os.strerror(number) if number > 0 else str(error)
        if number == errno.ENOMEM:
            limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            allowed = "any" if limit == resource.RLIM_INFINITY else format_bytes(limit)
            advice = f"; this user may lock {allowed}, see `ulimit -l` (LimitMEMLOCK= of a service)"
        raise TransportUnavailable(f"{what}: {reason}{advice}") from None
