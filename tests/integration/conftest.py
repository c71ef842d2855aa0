"""Fixtures of tests over a whole pool in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ConfigMaker
from tests.integration.gate import Gate
from tiermem.embedded import EmbeddedPool
from tiermem.source import choice

PoolMaker = Callable[..., EmbeddedPool]


@pytest.fixture
def embedded(config: ConfigMaker) -> Iterator[PoolMaker]:
    """Makes embedded pools; options are the configuration's. At the end each is checked and closed."""
    made: list[EmbeddedPool] = []

    def make(*, transient: bool = False, **options: object) -> EmbeddedPool:
        made.append(EmbeddedPool(config(**options), transient=transient))
        return made[-1]

    yield make
    for pool in made:
        if not pool._closed:
            pool._pool.check()
        pool.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of 64 KiB, so that a small checkpoint has many."""
    monkeypatch.setattr(choice, "BLOCK_BYTES", 64 << 10)
