"""Unloading and closing a pool while it loads."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from tests.conftest import CheckpointWriter, until
from tests.integration.conftest import PoolMaker
from tests.integration.gate import Gate, Running, assert_empty
from tiermem.errors import (
    Closed,
    Refused,
)
from tiermem.load import Load
from tiermem.types import PAGE_BYTES


def test_unloading_ends_a_load(embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate) -> None:
    written = checkpoint(layers=4)
    pool = embedded()
    loading = Running(pool.load, written.path)
    gate.wait()
    removing = Running(pool.remove, "model")
    until(lambda: any(load.error for load in pool._pool.loads().values()))
    gate.open()
    assert removing.answer() == 4 * PAGE_BYTES
    with pytest.raises(Refused, match="model was unloaded while it was loading"):
        loading.answer()
    assert_empty(pool)
    assert pool.load(written.path) == "model"


def test_a_model_that_is_leased_while_it_loads_is_not_unloaded(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate
) -> None:
    written = checkpoint()
    pool = embedded()
    with pool.open(written.path) as model:
        for call in (pool.remove, pool.evict):
            with pytest.raises(Refused, match=f"model is leased by process {os.getpid()}"):
                call("model")
        gate.open()
        assert written.same(model)


def test_unloading_too_late_does_not_take_a_model_from_who_opened_it(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load was ending when it was told to give up; its model was opened before the unloading went on."""
    written = checkpoint()
    pool = embedded()
    ending, go_on, kept, finish = (threading.Event() for _ in range(4))
    outcome, put = Load.outcome, pool._pool._digests.put

    def slow_outcome(load: Load) -> Exception | None:
        error = outcome(load)
        ending.set()
        assert go_on.wait(20)
        return error

    def slow_put(*args: Any) -> None:
        put(*args)
        kept.set()
        assert finish.wait(20)

    monkeypatch.setattr(Load, "outcome", slow_outcome)
    monkeypatch.setattr(pool._pool._digests, "put", slow_put)
    loading = Running(pool.load, written.path)
    assert ending.wait(20)
    removing = Running(pool.remove, "model")
    until(lambda: any(load.error for load in pool._pool.loads().values()))
    go_on.set()
    assert kept.wait(20)
    model = pool.open("model")
    finish.set()
    assert loading.answer() == "model"
    with pytest.raises(Refused, match="leased by process"):
        removing.answer()
    assert written.same(model)
    pool._pool.check()
    model.close()


def test_unloading_gives_up_a_load_that_began_while_it_waited(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint()
    pool = embedded(read_threads=1)
    gate.open()
    pool.load(written.path)
    pool.evict("model")
    gate.close()
    again = Gate(monkeypatch)
    again.open()
    end = Load.end
    begun: list[Future[None]] = []

    def end_and_begin_another(load: Load, error: Exception | None) -> None:
        if not begun:
            again.close()
            begun.append(pool._pool.load(str(written.path))[1])
        end(load, error)

    monkeypatch.setattr(Load, "end", end_and_begin_another)
    loading = Running(pool.load, written.path)
    again.wait()
    removing = Running(pool.remove, "model")
    until(lambda: any(load.error for load in pool._pool.loads().values()))
    gate.open()
    until(lambda: bool(begun) and any(load.error for load in pool._pool.loads().values()))
    again.open()
    assert removing.answer() == 2 * PAGE_BYTES
    for each in (loading.answer, begun[0].result):
        with pytest.raises(Refused, match="unloaded while it was loading"):
            each()
    assert_empty(pool)


def test_closing_during_a_load_tells_who_waits(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate, small_blocks: None
) -> None:
    written = checkpoint(layers=4)
    pool = embedded(read_threads=1)
    model = pool.open(written.path)
    waiting, loading = Running(model.wait), Running(pool.load, written.path)
    gate.wait()
    closing = Running(pool.close)
    until(lambda: pool._pool.loader._closed)
    gate.open()
    closing.answer()
    for each in (waiting, loading):
        with pytest.raises(Closed, match="the pool closed while model was loading"):
            each.answer()


def test_an_open_that_comes_while_the_pool_closes_does_not_hang(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint()
    pool = embedded()
    begin = pool._pool._begin

    def begin_late(record: Any) -> None:
        pool._pool.loader.close()
        begin(record)

    monkeypatch.setattr(pool._pool, "_begin", begin_late)
    loading = Running(pool.load, written.path)
    with pytest.raises(Closed):
        loading.answer()
    pool.close()
