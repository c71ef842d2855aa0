"""Loading through a whole pool: once, verified, and with nothing left behind where it fails."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Checkpoint, CheckpointWriter
from tests.integration.conftest import PoolMaker
from tiermem import _native
from tiermem import pool as pool_module
from tiermem.embedded import EmbeddedPool
from tiermem.errors import (
    CheckpointChanged,
    CheckpointNotFound,
    Closed,
    DeadlineExceeded,
    DigestMismatch,
    NativeError,
    ReadError,
    Refused,
    TensorNotFound,
    TiermemError,
)
from tiermem.load import Load
from tiermem.source.file import FileSource
from tiermem.types import PAGE_BYTES

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


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads of 64 KiB, so that a small checkpoint has many."""
    monkeypatch.setattr(pool_module, "BLOCK_BYTES", 64 << 10)


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


def test_what_is_in_the_file_is_in_the_model(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written = checkpoint(layers=5, files=2, kib=300)
    pool = embedded()
    with pool.open(written.path) as model:
        assert written.same(model)
        assert len(model) == len(written.tensors)
        assert bytes(model.raw("model.layers.3.weight")) == written.tensors["model.layers.3.weight"].tobytes()
        assert set(model.residency()) == {f"model.layers.{i}" for i in range(5)}
        assert not model["model.layers.0.weight"].flags.writeable
        with pytest.raises(TensorNotFound, match=r"model has no tensor 'absent'; it has 10 others"):
            model["absent"]
        with pytest.raises(TensorNotFound):
            model.wait(["model.layers.0.weight", "absent"])


def test_tensors_of_every_form(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    forms: dict[str, Any] = {
        "scalar": np.array(7.5, np.float64),
        "empty": np.empty((0, 3), np.float32),
        "one": np.array([True]),
        "i8": np.arange(-5, 5, dtype=np.int8).reshape(2, 5),
        "f16": np.array([1.5, -2.0], np.float16),
        "u64": np.array([2**64 - 1], np.uint64),
    }
    written = checkpoint(extra=forms)
    with embedded().open(written.path) as model:
        for name, array in forms.items():
            assert model[name].shape == array.shape
            assert model[name].dtype == array.dtype
            assert np.array_equal(model[name], array)


def raw_checkpoint(directory: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    directory.mkdir(exist_ok=True)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return directory


def test_a_checkpoint_without_tensors(embedded: PoolMaker, tmp_path: Path) -> None:
    path = raw_checkpoint(tmp_path / "empty", {})
    pool = embedded()
    assert pool.load(path) == "empty"
    model = pool.open(path)
    model.wait()
    assert dict(model) == {}
    assert model_status(pool, "empty")["state"] == "resident"
    with pytest.raises(Refused, match="leased"):
        pool.remove("empty")
    del model
    until(lambda: model_status(pool, "empty")["leases"] == 0)
    assert pool.remove("empty") == 0
    assert_empty(pool)


def test_a_checkpoint_of_empty_tensors_alone(embedded: PoolMaker, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = raw_checkpoint(tmp_path / "model", {"a": entry, "b": entry | {"shape": [4, 0, 2]}})
    pool = embedded()
    with pool.open(path) as model:
        assert model["a"].shape == (0,)
        assert model["b"].shape == (4, 0, 2)
    assert pool.load(path) == "model"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not come true within 10 s"
        time.sleep(0.002)


def test_however_many_ask_it_is_read_once(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate, small_blocks: None
) -> None:
    written = checkpoint(layers=4)
    pool = embedded(read_threads=3)
    barrier = threading.Barrier(8)

    def reader(number: int) -> bool:
        barrier.wait(10)
        if number % 4 == 0:
            pool.load(written.path)
        with pool.open(written.path) as model:
            return written.same(model)

    readers = [Running(reader, number) for number in range(8)]
    gate.wait()
    assert all(each.running for each in readers)
    gate.open()
    assert [each.answer() for each in readers] == [True] * 8
    status = model_status(pool)
    assert status["last_load"]["read_bytes"] == written.nbytes == status["bytes"]
    assert status["opens"] == 8
    assert len(pool._pool.catalog) == 1


def test_a_file_of_a_directory_is_the_same_model(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written = checkpoint(layers=4, files=2)
    pool = embedded()
    pool.load(written.path)
    with pool.open(written.files[1]) as shard:
        assert set(shard) == {name for name in written.tensors if name.split(".")[2] in "23"}
        assert all(np.array_equal(shard[name], written.tensors[name]) for name in shard)
        shard.wait()
        assert shard.name == "model"
        with pytest.raises(TensorNotFound):
            shard["model.layers.0.weight"]
    assert pool.load(written.files[0]) == "model"
    assert len(pool._pool.catalog) == 1


def test_layers_decide_the_segments(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written = checkpoint(layers=2)
    layers = {"model.layers.0.weight": "weights", "model.layers.1.weight": "weights", "model.layers.0.bias": "rest"}
    pool = embedded()
    with pool.open(written.path, layers=layers) as model:
        assert set(model.residency()) == {"weights", "rest", "model.layers.1"}
        assert written.same(model)
    assert model_status(pool)["segments"] == 3


def test_wanted_tensors_are_read_before_the_others(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate, small_blocks: None
) -> None:
    written = checkpoint(layers=16)
    pool = embedded(read_threads=1)
    seen: list[tuple[int, ...]] = []
    perform = Load.perform

    def watched(load: Load, task: Any, staging: Any) -> None:
        seen.append(task.tensors)
        perform(load, task, staging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Load, "perform", watched)
        model = pool.open(written.path)
        gate.wait()
        last = model.manifest.tensors[-1].name
        wanted = Running(model.wait, [last])
        until(lambda: any(load.urgent for load in pool._pool.loads().values()))
        gate.open()
        wanted.answer()
        model.wait()
    number = model.manifest.by_name[last]
    assert number in seen[1], "right behind the read that was under way"
    model.close()


def test_a_wait_has_its_limit_and_takes_nobody_along(
    embedded: PoolMaker, checkpoint: CheckpointWriter, gate: Gate
) -> None:
    written = checkpoint()
    pool = embedded()
    with pool.open(written.path) as model:
        for names in (None, ["model.layers.0.weight"]):
            with pytest.raises(DeadlineExceeded, match=r"model was not loaded within 10\.0 ms"):
                model.wait(names, timeout_s=0.01)
        gate.open()
        model.wait(timeout_s=20)
        assert written.same(model)


# --- what goes wrong ----------------------------------------------------------------------------------------------


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
        pool._pool.dram.drop(pool._pool.catalog.named("model"), 1)
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


# --- unloading and closing meanwhile ---------------------------------------------------------------------------------


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
