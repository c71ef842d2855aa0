"""Gate: holds the reads of loads, so that tests can look at what is under way; and what they look with."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiermem.embedded import EmbeddedPool
from tiermem.source.file import FileSource

Damage = Callable[[Path, int], None]


class Gate:
    """Holds every read of every source until it is opened; `entered` tells that one is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        read = FileSource.read

        def gated(source: FileSource, *args: Any) -> None:
            self.entered.set()
            assert self._open.wait(20)
            read(source, *args)

        monkeypatch.setattr(FileSource, "read", gated)

    def open(self) -> None:
        self._open.set()

    def close(self) -> None:
        self._open.clear()

    def wait(self) -> None:
        assert self.entered.wait(20)


class Running:
    """A call on a thread of its own, with a time limit on its answer."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, args), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            self.result = call(*args)
        except BaseException as error:
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def answer(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self.result


def model_status(pool: EmbeddedPool, name: str = "model") -> dict[str, Any]:
    (status,) = pool.status(name)["models"]
    return status  # type: ignore[no-any-return]


def assert_empty(pool: EmbeddedPool) -> None:
    pool._pool.check()
    status = pool.status()
    assert status["models"] == []
    assert status["tiers"][0]["used_bytes"] == 0
    assert pool._pool.loads() == {}


def used(pool: EmbeddedPool) -> int:
    return int(pool.status()["tiers"][0]["used_bytes"])


def in_tmpfs(pool: EmbeddedPool) -> int:
    """Bytes that the pool's file system really holds."""
    facts = os.fstatvfs(pool._pool.memory.backing._dirfd)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize
