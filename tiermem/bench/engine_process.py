"""An engine's process as the bench holds it: started, told to go, asked for its figures, ended. Measures no time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiermem.bench.engine_memory import memory_of
from tiermem.errors import Refused

_LIMIT_S = 600.0
_END_S = 30.0


class Unusable(Exception):
    """The engine is installed and cannot be imported; the text says why."""


class EngineProcess:
    """One run of engine_run.py. It has the engine imported once this is constructed; `end` ends it."""

    def __init__(self, engine: str, path: str, way: str, address: str, room: Path) -> None:
        self._what = f"{engine}, {way}"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `end`)
        settings = {name: value for name, value in os.environ.items() if not name.startswith("TIERMEM_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tiermem.bench.engine_run"], env=settings | {"TIERMEM_ADDRESS": address},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._buffer = b""
        try:
            self._send(json.dumps({"engine": engine, "path": path, "way": way, "room": str(room)}))
            said = self._receive()
            if "unusable" in said:
                raise Unusable(said["unusable"])
        except BaseException:
            self.end()
            raise

    def go(self) -> None:
        """Load, and put out the first token."""
        self._send("")

    def loaded(self) -> dict[str, float]:
        """`load_s` and `first_output_s`. Raises Refused with the process's last words where it failed."""
        return self._receive()

    def answer(self) -> object:
        """What must be the same whoever loaded the weights. Raises Refused."""
        self._send("")
        return self._receive()["answer"]

    def memory(self) -> dict[str, int]:
        """Of the process and those that it started, while it holds the model."""
        return memory_of(self._process.pid, tree=True)

    def end(self) -> None:
        """Idempotent. It is killed: nothing is measured any more, and an engine takes long to stop by itself."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        deadline = time.monotonic() + _LIMIT_S
        while b"\n" not in self._buffer:
            if not select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise Refused(f"{self._what}: did not answer within {_LIMIT_S:.0f} s; give it a smaller model")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise Refused(f"{self._what}: {self._last_words()}")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _last_words(self) -> str:
        code = self._process.wait(_END_S)
        self._errors.seek(0)
        words = self._errors.read().strip().splitlines() or ["it said nothing"]
        return f"ended with {code}: {words[-1]}"
