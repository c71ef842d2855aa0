"""A process of vLLM's interpreter that runs engines for a test (`vllm_run.py`). Never outlives its `with` block."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 300.0
"""Deadline of an answer: an engine may start on a busy machine."""


class EngineError(Exception):
    """What vLLM raised, as text."""


class VllmProcess:
    """`directory` takes vLLM's caches and its log. Engines run in this process, their ranks in its children."""

    def __init__(self, python: str, directory: Path, **environment: str) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", dir=directory, prefix="vllm-", suffix=".log")  # noqa: SIM115
        self._buffer = b""
        self._process = subprocess.Popen(
            [python, "-m", "tests.engines.vllm_run"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=REPOSITORY,
            env=vllm_environment(directory) | environment,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def ask(self, do: str, **options: Any) -> Any:
        """Obey a command and return its value. Raises EngineError."""
        self.tell(do, **options)
        return self.answer()

    def tell(self, do: str, **options: Any) -> None:
        """Begin a command; `answer` must follow."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **options}).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + START_S
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self._process.stdout], [], [], left)[0], f"no answer; log: {self.log[-3000:]}"
            part = os.read(self._process.stdout.fileno(), 65536)
            assert part, f"ended with {self._process.wait(30)}; log: {self.log[-3000:]}"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        body = json.loads(line)
        if "error" in body:
            raise EngineError(body["error"])
        return body["value"]

    @property
    def log(self) -> str:
        """What vLLM printed so far."""
        return Path(self._log.name).read_text()

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        # With it go the workers of its engine, which are of its session.
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(30)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            stream.close()


def vllm_environment(directory: Path) -> dict[str, str]:
    """Of a process that runs vLLM on the CPU, with little memory and without a network."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TIERMEM_", "VLLM_"))}
    return inherited | {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # the commands send functions to the workers
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(directory / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def pool_options(address: str, **options: Any) -> dict[str, Any]:
    """Of an engine that loads from the pool at `address`."""
    return {"load_format": "tiermem", "model_loader_extra_config": {"address": address, **options}}


def warnings(log: str) -> list[str]:
    """What the loader warned of."""
    return [line for line in log.splitlines() if "WARNING" in line and "[vllm_loader.py" in line]
