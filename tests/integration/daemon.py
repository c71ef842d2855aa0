"""Daemon: a real `tiermem serve` in a directory of its own, to be killed and started again. Leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiermem
from tests.integration.child import NOBODY, Child, eventually
from tests.integration.weights import Weights, digest_of
from tiermem.client import Client


class Daemon:
    """Started when constructed. `options` are further flags of `serve`; `ordinary` runs it without any rights.

    `directory` holds socket, state and digests; with it, a second daemon is put beside an earlier one.
    """

    def __init__(
        self,
        *options: str,
        tier: str = "dram=64MiB",
        backing: str = "auto",
        ordinary: bool = False,
        prefix: Sequence[str] = (),
        start: bool = True,
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tiermem-", dir="/tmp"))
        self.uid = NOBODY if ordinary else None
        if ordinary:
            os.chown(self.directory, NOBODY, NOBODY)
        self.socket = self.directory / "s"
        self.state = self.directory / "state"
        self.digests = self.directory / "digests"
        self.address = f"unix:{self.socket}"
        self.prefix = prefix
        self.flags = ["--tier", tier, "--backing", backing, *options]
        self.child: Child | None = None
        self.ready = ""
        if start:
            try:
                self.start()
            except BaseException:
                self.close()
                raise

    @property
    def arguments(self) -> list[str]:
        """Of the process, up to its options."""
        return [
            "-m", "tiermem", "serve", "--address", self.address,
            "--state", str(self.state), "--digests", str(self.digests),
        ]  # fmt: skip

    @property
    def pid(self) -> int:
        assert self.child is not None
        return self.child.pid

    @property
    def log(self) -> str:
        assert self.child is not None
        return self.child.errors

    @property
    def segments(self) -> Path:
        """Where its segment files are, on a backing that has files."""
        return self.shm if self.shm.exists() else self.state / "segments"

    def start(self, *options: str) -> None:
        """Start it (again), with further options, and wait until clients can connect."""
        if self.child is not None:
            self.child.__exit__()
        self.child = self.spawn(*options)
        self.ready = self.child.line()
        assert self.ready.startswith(f"serving {self.address}")

    def spawn(self, *options: str) -> Child:
        """The process, whether or not it will serve."""
        return Child([*self.arguments, *self.flags, *options], uid=self.uid, prefix=self.prefix)

    def kill9(self) -> None:
        assert self.child is not None
        self.child.kill9()

    def terminate(self) -> int:
        """End it by SIGTERM; returns the exit code."""
        assert self.child is not None
        self.child.signal(signal.SIGTERM)
        return self.child.exit_code()

    def restart(self, *options: str) -> None:
        """Kill it and start another on the same directories."""
        self.kill9()
        self.start(*options)

    def client(self) -> Client:
        return tiermem.connect(self.address)

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            return client.status()

    def model(self, name: str) -> dict[str, Any]:
        """Status of one model."""
        with self.client() as client:
            found: dict[str, Any] = client.status(name)["models"][0]
            return found

    def open_files(self) -> int:
        """Descriptors that the process has."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def leases(self) -> int:
        return int(self.status()["pool"]["leases"])

    def settle(self) -> tuple[dict[str, Any], ...]:
        """Wait until no load or check is under way and the catalog is on disk; the status of all models."""
        with self.client() as client:

            def settled() -> bool:
                states = [model["state"] for model in client.status()["models"]]
                return "loading" not in states and len(list((self.state / "catalog").glob("[!.]*"))) == len(states)

            eventually(settled, "loads ended and are on record", 10)
            models: tuple[dict[str, Any], ...] = client.status()["models"]
            return models

    def serves(self, weights: Weights) -> bool:
        """Whether a new client reads the right bytes."""
        with self.client() as client, client.open(weights.path) as model:
            return digest_of(model) == weights.digest

    @property
    def leftovers(self) -> list[str]:
        """Mounts, segment files, catalog files and sockets that are there."""
        files = [self.socket, Path(f"{self.socket}.fd"), self.shm]
        kept = [*self.state.glob("segments/*"), *self.state.glob("catalog/*")]
        return [*self._mounts(), *(str(path) for path in (*files, *kept) if path.exists())]

    @property
    def shm(self) -> Path:
        """Where its segments are on the backing shm."""
        owner = os.geteuid() if self.uid is None else self.uid
        tail = hashlib.sha256(str(self.state / "segments").encode()).hexdigest()[:12]
        return Path(f"/dev/shm/tiermem-{owner}-{tail}")

    def _mounts(self) -> list[str]:
        points = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
        return [point for point in points if Path(point).is_relative_to(self.directory)]

    def close(self) -> None:
        """Kill it and remove all that it left."""
        if self.child is not None:
            self.child.__exit__()
        for point in reversed(self._mounts()):
            subprocess.run(["umount", "--lazy", point], check=True)
        shutil.rmtree(self.shm, ignore_errors=True)
        shutil.rmtree(self.directory)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
