"""Starts and ends the processes of a run: workers that are measured, and daemons of our own. Measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiermem
from tests.bench import limits, memory

REPOSITORY = Path(__file__).resolve().parents[2]
_START_S, _SPARE_S, _RELEASE_S, _QUIET_S = 30.0, 300.0, 5.0, 10.0


class Worker:
    """A fresh process with everything imported; `go` begins its measurement, `result` waits for it, `end` ends it."""

    def __init__(self, task: Mapping[str, object], address: str = "") -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.worker"], cwd=REPOSITORY, text=True, env=environment(address),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self.pid = self._process.pid
        self._send(json.dumps(task))
        self._receive()

    def go(self) -> None:
        self._send("")

    def result(self) -> dict[str, Any]:
        return self._receive()

    def end(self) -> None:
        """Idempotent; a worker that did not finish is killed."""
        if self._process.poll() is None:
            try:
                self._send("")
                self._process.wait(_START_S)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None and not stream.closed:
                stream.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            # A peer may print as well.
            if line.startswith("{"):
                message: dict[str, Any] = json.loads(line)
                return message
        self._process.wait()
        self._errors.seek(0)
        raise RuntimeError(f"a worker ended with {self._process.returncode}: {self._errors.read()[-2000:]}")


def run_worker(task: Mapping[str, object], address: str = "") -> dict[str, Any]:
    """One measurement in a process of its own."""
    worker = Worker(task, address)
    try:
        busy = limits.wait_for_quiet(_QUIET_S)
        worker.go()
        return worker.result() | {"busy_before": busy}
    finally:
        worker.end()


class Daemon:
    """A daemon in a directory of its own, and a client of it."""

    def __init__(self, address: str, pid: int, client: tiermem.Client) -> None:
        self.address = address
        self.pid = pid
        self.client = client
        idle = memory.status(pid)
        self.idle_bytes = idle["VmRSS"] - idle["RssShmem"] - int(client.status()["staging_bytes"])
        """Of memory that is neither a segment's nor there to read through, before the first load."""

    def model(self, directory: str) -> dict[str, Any] | None:
        """The status of the model of a directory, without the leases that were just released, or None."""
        deadline = time.monotonic() + _RELEASE_S
        while True:
            models: list[dict[str, Any]] = self.client.status()["models"]
            model = next((model for model in models if model["path"] == directory), None)
            if model is None or not model["leases"] or time.monotonic() > deadline:
                return model
            time.sleep(0.01)

    def remove(self, directory: str) -> None:
        """Take the model of a directory out, if it is there."""
        model = self.model(directory)
        if model is not None:
            self.client.remove(model["name"])

    def wait_for_spare(self) -> float:
        """Return when the stock of spare memory is full; seconds that it took to fill in all. Raises TimeoutError."""
        deadline = time.monotonic() + _SPARE_S
        while time.monotonic() < deadline:
            spare = self.client.status()["spare"]
            if spare["ready_bytes"] >= spare["target_bytes"]:
                return float(spare["prefault_s"])
            time.sleep(0.05)
        raise TimeoutError(f"the spare memory is not full after {_SPARE_S} s: {spare}; give the bench more memory")


@contextmanager
def daemon(dram_bytes: int, spare_bytes: int = 0, *options: str, module: str = "tiermem") -> Iterator[Daemon]:
    """A daemon that ends with the block. `module` runs the command line; `options` are further flags of `serve`."""
    with tempfile.TemporaryDirectory(prefix="tiermem-bench-") as place:
        address = f"unix:{place}/d.sock"
        command = [sys.executable, "-m", module, "serve", "--address", address, "--state", f"{place}/state",
                   "--digests", f"{place}/digests", "--tier", f"dram={dram_bytes}", "--spare", str(spare_bytes),
                   "--log-level", "warning", *options]  # fmt: skip
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment(address), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            if not process.stdout.readline():
                raise RuntimeError(f"the daemon ended with {process.wait()}")
            with tiermem.Client(address) as client:
                yield Daemon(address, process.pid, client)
        finally:
            process.terminate()
            try:
                process.wait(_START_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def environment(address: str) -> dict[str, str]:
    """This process's, less its settings of ours, so that nothing but the bench decides which pool is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TIERMEM_")}
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path} | ({"TIERMEM_ADDRESS": address} if address else {})
