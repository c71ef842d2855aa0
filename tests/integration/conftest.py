"""Fixtures of tests over a whole pool in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.conftest import ConfigMaker
from tiermem.embedded import EmbeddedPool

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
