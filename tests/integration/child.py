"""Child: a process that a test talks to by lines. Every wait has a deadline; never outlives its `with` block."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
DEADLINE_S = 20.0

PRELUDE = """
import os, sys, time
import tiermem
from tests.integration.weights import digest_of
def say(text):
    print(text, flush=True)
def pause():
    return sys.stdin.readline().strip()
"""


class Child:
    """`python -m ...` or `python -c ...` with this repository on its path. `uid` runs it as another user."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        uid: int | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        rights = () if uid is None else rights_of(uid)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by __exit__
        self._buffer = b""
        self._process = subprocess.Popen(
            [*prefix, *rights, sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd="/",
            env=_environment(),
        )
        self.pid = self._process.pid

    @classmethod
    def script(cls, text: str, *arguments: object, uid: int | None = None) -> Child:
        """Run `text` after the prelude (say, pause, digest_of); `sys.argv[1:]` are the arguments."""
        return cls(["-c", PRELUDE + text, *map(str, arguments)], uid=uid)

    @property
    def errors(self) -> str:
        """What it wrote on stderr so far."""
        self._errors.seek(0)
        return self._errors.read()

    def line(self, timeout_s: float = DEADLINE_S) -> str:
        """Its next line on stdout. Fails with its stderr if it ends first."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0, f"no line within {timeout_s} s; stderr: {self.errors}"
            if select.select([self._process.stdout], [], [], left)[0]:
                part = os.read(self._process.stdout.fileno(), 65536)
                assert part, f"ended with {self.exit_code()} before its next line; stderr: {self.errors}"
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def say(self, text: str = "") -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill9(self) -> None:
        self._process.kill()
        self.exit_code()

    def exit_code(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended."""
        return self._process.wait(timeout_s)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self.alive:
            self.kill9()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()


def _environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TIERMEM_")}
    return {**inherited, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}


@cache
def rights_of(uid: int) -> tuple[str, ...]:
    """The command before a command that runs it as another user; skips the test where that one has no Python."""
    rights = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups")
    command = [*rights, sys.executable, "-c", "import tiermem.client"]
    if subprocess.run(command, cwd="/", env=_environment(), capture_output=True).returncode:
        pytest.skip(f"user {uid} cannot run {sys.executable} with what is installed for it")
    return rights


def eventually(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Return as soon as `condition()` is true; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
