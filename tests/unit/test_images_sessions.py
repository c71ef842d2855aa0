"""Sessions that end at the worst moment of an image's life, while threads of the pool are at work on its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import ConfigMaker, until
from tests.integration.gate import Running
from tests.unit.paint import PAGES, TENSORS, prints
from tiermem import _native
from tiermem.errors import CapacityError, Closed, Refused
from tiermem.images import Images
from tiermem.lease import Opened, Session
from tiermem.load import Load
from tiermem.pool import Pool
from tiermem.types import PAGE_BYTES


@pytest.fixture
def pool(config: ConfigMaker) -> Iterator[Pool]:
    """Has room for one image, and is empty at the end."""
    pool = Pool(config(tier=f"dram={PAGES * PAGE_BYTES}B"), embedded=True)
    yield pool
    pool.check()
    assert len(pool.leases) == len(pool.catalog) == pool.tiers.memory[0].used_bytes == pool.quarantined == 0
    pool.close()


class Held:
    """Calls of a method that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type[Any], name: str) -> None:
        self.entered, self._go = threading.Event(), threading.Event()
        call: Callable[..., None] = getattr(owner, name)

        def held(*args: Any) -> None:
            self.entered.set()
            assert self._go.wait(20)
            call(*args)

        monkeypatch.setattr(owner, name, held)

    def let_go(self) -> None:
        self._go.set()


def filling(pool: Pool, opened: Opened) -> bool:
    with pool.lock:
        return pool.draft_of(opened.lease) is not None


def test_a_session_that_ends_while_memory_is_prefaulted(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is not dropped under the threads that prefault it, and who comes next fills the image."""
    prefault = Held(monkeypatch, _native.Segment, "prefault")
    images, gone, there = Images(pool), Session(7, 0), Session(8, 0)
    first = Running(images.create, gone, prints(), TENSORS)
    assert prefault.entered.wait(20)
    pool.end_session(gone)
    (draft,) = pool.loads().values()
    second = Running(images.create, there, prints(), TENSORS)
    with pytest.raises(CapacityError):
        images.create(there, prints("other"), TENSORS)
    assert list(pool.loads().values()) == [draft], "its memory is still in use"
    prefault.let_go()
    first.answer()
    opened, empty = second.answer()
    assert empty
    assert filling(pool, opened)
    assert pool.leases.pids(opened.record.id) == [8]
    with pytest.raises(Refused, match="process 7 left"):
        images.create(gone, prints(), TENSORS)
    pool.end_session(there)


def test_a_session_that_ends_while_its_image_is_digested_leaves_the_image(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Held(monkeypatch, Load, "perform")
    images, gone = Images(pool), Session(7, 0)
    opened, _ = images.create(gone, prints(), TENSORS, "image")
    sealed = images.seal(opened.lease)
    assert digest.entered.wait(20)
    with pytest.raises(Refused, match="not of an image that is being filled"):
        images.seal(opened.lease)
    assert not filling(pool, opened), "no more writable descriptors"
    pool.end_session(gone)
    digest.let_go()
    assert sealed.result(20) is None
    assert opened.record.ready.all()
    assert pool.evict("image") == PAGES * PAGE_BYTES


def test_a_pool_that_closes_before_the_digests_keeps_nothing(
    config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = Held(monkeypatch, Load, "perform")
    pool = Pool(config(), embedded=True)
    images = Images(pool)
    opened, _ = images.create(Session(7, 0), prints(), TENSORS)
    sealed = images.seal(opened.lease)
    assert digest.entered.wait(20)
    closing = Running(pool.close)
    until(lambda: pool.loader._closed)
    digest.let_go()
    closing.answer()
    assert isinstance(sealed.exception(20), Closed)


def test_eight_sessions_at_once_fill_one_image(pool: Pool) -> None:
    images = Images(pool)
    sessions = [Session(pid, 0) for pid in range(8)]
    asked = [Running(images.create, session, prints(), TENSORS) for session in sessions]
    answers = [each.answer() for each in asked]
    assert [empty for _, empty in answers].count(True) == 1
    for session in sessions:
        pool.end_session(session)
