"""Network: hosts of a test, each a network namespace with one cable to a switch, which is a namespace too.

Cables can be given a rate and be cut. Only networks are apart: files and Unix sockets are this host's. Nothing of it is
seen in the namespace of the test, and nothing outlives its `with` block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import count
from pathlib import Path

import pytest

from tests.conftest import CAP_SYS_ADMIN, has_capability

BURST = "256kb"
"""What a cable with a rate lets through at once: some of the largest packets that there are."""

_networks = count()


class NetworkHost:
    """A host, reached at `address`, by a cable of `rate` (as tc writes it, such as `1gbit`) each way, or a fast one."""

    def __init__(self, network: Network, number: int, rate: str | None) -> None:
        self.name, self._switch, self._port = f"{network.name}-{number}", network.name, f"p{number}"
        self.address = f"10.77.0.{number}"
        _ip("netns", "add", self.name)
        _ip("-n", self._switch, "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("-n", self._switch, "link", "set", self._port, "master", "switch", "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.name, "link", "set", device, "up")
        if rate is not None:
            shape = ("root", "tbf", "rate", rate, "burst", BURST, "latency", "50ms")
            self.tc("qdisc", "add", "dev", "eth0", *shape)
            _run("tc", "-n", self._switch, "qdisc", "add", "dev", self._port, *shape)

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command that is to run there."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    @property
    def received_bytes(self) -> int:
        """All that came by its cable, with headers."""
        return self._counters()[0]

    @property
    def sent_bytes(self) -> int:
        """All that left by its cable, with headers."""
        return self._counters()[8]

    def _counters(self) -> list[int]:
        lines = _run(*self.prefix, "cat", "/proc/net/dev").splitlines()
        (line,) = (line for line in lines if line.strip().startswith("eth0:"))
        return [int(field) for field in line.partition(":")[2].split()]

    def tc(self, *arguments: str) -> None:
        _run("tc", "-n", self.name, *arguments)

    def cut(self) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        _ip("-n", self._switch, "link", "set", self._port, "up")


class Network:
    """A switch without cables."""

    def __init__(self) -> None:
        if not has_capability(CAP_SYS_ADMIN) or not all(map(shutil.which, ("ip", "tc", "nsenter"))):
            pytest.skip("lacks CAP_SYS_ADMIN, or iproute2 and nsenter, which network namespaces need")
        self.name = f"tm{os.getpid()}-{next(_networks)}"
        self.hosts: list[NetworkHost] = []
        _ip("netns", "add", self.name)
        try:
            _ip("-n", self.name, "link", "add", "switch", "type", "bridge")
            _ip("-n", self.name, "link", "set", "switch", "up")
        except BaseException:
            self.close()
            raise

    def host(self, rate: str | None = None) -> NetworkHost:
        self.hosts.append(NetworkHost(self, len(self.hosts) + 1, rate))
        return self.hosts[-1]

    def close(self) -> None:
        for path in Path("/run/netns").glob(f"{self.name}*"):
            _ip("netns", "delete", path.name)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
