"""Loads that fail through a whole pool: whoever waits is told, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Checkpoint, CheckpointWriter
from tests.integration.conftest import PoolMaker
from tests.integration.gate import Damage, Gate, assert_empty, model_status
from tiermem import _native
from tiermem.embedded import EmbeddedPool
from tiermem.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    DigestMismatch,
    NativeError,
    ReadError,
    TiermemError,
)
from tiermem.load import Load
from tiermem.source.file import FileSource


def both_fail(pool: EmbeddedPool, written: Checkpoint, error: type[TiermemError], gate: Gate) -> None:
    """A load and a reader that are under way at once both get the error, and nothing stays."""
    model = pool.open(written.path)
    gate.open()
    for names in (["model.layers.1.weight"], None, ["model.layers.0.weight"]):
        with pytest.raises(error):
            model.wait(names)
    with pytest.raises(error):
        model["model.layers.1.weight"]
    model.close()
    with pytest.raises(error):
        pool.load(written.path)
    assert_empty(pool)


def test_bytes_that_changed_since_the_first_load_are_refused(
    embedded: PoolMaker, checkpoint: CheckpointWriter, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same size, same times: only the digests tell."""
    written = checkpoint(files=2)
    embedded().load(written.path)
    damage(written.files[1], 3)
    pool = embedded()
    both_fail(pool, written, DigestMismatch, Gate(monkeypatch))
    damage(written.files[1], 3)
    assert pool.load(written.path) == "model"
    with pool.open("model") as model:
        assert written.same(model)


def test_files_that_swapped_their_names_are_the_same_weights(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written = checkpoint(files=2, layers=4)
    embedded().load(written.path)
    first, second = written.files
    first.rename(written.path / "first")
    second.rename(first)
    (written.path / "first").rename(second)
    with embedded().open(written.path) as model:
        assert written.same(model)


def test_a_reader_of_a_load_that_failed_never_sees_its_bytes(
    embedded: PoolMaker, checkpoint: CheckpointWriter, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later load that succeeds fills other segments than this reader has mapped."""
    written = checkpoint()
    embedded().load(written.path)
    damage(written.files[0], 3)
    pool = embedded()
    gate = Gate(monkeypatch)
    early = pool.open(written.path)
    gate.open()
    with pytest.raises(DigestMismatch):
        early.wait()
    damage(written.files[0], 3)
    with pool.open(written.path) as late:
        assert written.same(late)
        for names in (None, list(written.tensors)):
            with pytest.raises(DigestMismatch):
                early.wait(names)
    early.close()


def test_a_reload_that_fails_leaves_the_rest_of_the_model_and_no_bad_bytes(
    embedded: PoolMaker, checkpoint: CheckpointWriter, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = checkpoint()
    pool = embedded()
    pool.load(written.path)
    gate = Gate(monkeypatch)
    with pool._pool.lock:
        pool._pool.memory.drop(pool._pool.catalog.named("model"), 1)
    damage(written.files[0], 3)
    model = pool.open("model")
    gate.open()
    there = {"model.layers.0.weight", "model.layers.0.bias"}
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            model["model.layers.1.weight"]
    assert all(np.array_equal(model[name], written.tensors[name]) for name in there)
    model.close()
    pool._pool.check()
    assert model_status(pool)["state"] == "disk"
    damage(written.files[0], 3)
    with pool.open("model") as again:
        assert written.same(again)


def grown(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replaced(path: Path) -> None:
    """By a file of the same bytes and times, before it was opened."""
    facts = os.stat(path)
    path.with_name("copy").write_bytes(path.read_bytes())
    os.utime(path.with_name("copy"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(path.with_name("copy"), path)


def truncated(path: Path) -> None:
    os.truncate(path, 5000)


@pytest.mark.parametrize("change", [grown, touched, replaced, truncated])
def test_a_file_that_changes_during_the_load_is_refused(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate, change: Callable[[Path], None]
) -> None:
    written = checkpoint(files=2)
    pool = embedded()
    model = pool.open(written.path)
    gate.wait()
    change(written.files[1])
    gate.open()
    for names in (["model.layers.1.weight"], None):
        with pytest.raises(CheckpointChanged, match="at rest"):
            model.wait(names)
    model.close()
    assert_empty(pool)
    assert not list((pool._pool.config.digests).glob("*")), "no digest of it is kept"


def test_a_file_that_is_gone_when_it_is_read(embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate) -> None:
    written = checkpoint(files=2)
    pool = embedded()
    model = pool.open(written.path)
    gate.wait()
    written.files[1].unlink()
    gate.open()
    with pytest.raises(ReadError, match=r"model-1-of-2\.safetensors: .*check that the file exists"):
        model.wait()
    model.close()
    assert_empty(pool)
    with pytest.raises(CheckpointNotFound):
        pool.load(written.path / "absent.safetensors")


def test_a_first_load_that_fails_at_once_is_never_reported_as_done(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load may have ended before its caller looks."""
    written = checkpoint()
    pool = embedded()

    def broken(*_: object) -> None:
        raise ReadError("the disk is broken")

    monkeypatch.setattr(FileSource, "read", broken)
    add = pool._pool.loader.add

    def add_and_wait(load: Load) -> None:
        add(load)
        load.finished.exception(20)

    monkeypatch.setattr(pool._pool.loader, "add", add_and_wait)
    with pytest.raises(ReadError, match="broken"):
        pool.load(written.path)
    with pytest.raises(ReadError, match="broken"):
        pool.open(written.path)
    assert_empty(pool)


def test_staging_that_cannot_be_had_fails_the_open_and_leaves_nothing(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(nbytes: int) -> None:
        raise NativeError("cannot allocate staging memory", 12)

    written = checkpoint()
    pool = embedded()
    with monkeypatch.context() as patch:
        patch.setattr(_native, "Staging", none_left)
        with pytest.raises(NativeError, match="staging"):
            pool.open(written.path)
    assert_empty(pool)
    with pool.open(written.path) as model:
        assert written.same(model)
