"""Loading through a whole pool: once, verified, wanted tensors first."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import CheckpointWriter, until
from tests.integration.conftest import PoolMaker
from tests.integration.gate import Gate, Running, assert_empty, model_status
from tiermem.errors import (
    DeadlineExceeded,
    Refused,
    TensorNotFound,
)
from tiermem.load import Load


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
