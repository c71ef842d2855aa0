"""Files that torch.save wrote: what torch.load reads, the pool serves."""

from __future__ import annotations

import json
import os
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tiermem.torch
from tiermem.checkpoint import open_checkpoint
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CheckpointError

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    flat = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in (ours, theirs)]
    return torch.equal(*flat)


def assert_served(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    served = tiermem.torch.load_model(path)
    assert served.keys() == tensors.keys()
    assert all(same(served[name], tensor) for name, tensor in tensors.items())


def test_every_dtype_is_served(tmp_path: Path, pool: EmbeddedPool) -> None:
    tensors = {str(dtype): torch.arange(24).to(dtype).reshape(2, 3, 4) for dtype in DTYPES}
    torch.save(tensors, tmp_path / "m.pt")
    assert_served(tmp_path, torch.load(tmp_path / "m.pt", weights_only=True))


def test_a_module_is_served(tmp_path: Path, pool: EmbeddedPool) -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(dict(module.named_parameters()), tmp_path / "other.bin")
    assert_served(tmp_path, module.state_dict())
    assert_served(tmp_path / "other.bin", dict(module.named_parameters()))


def test_tied_tensors_and_parts_of_a_storage(tmp_path: Path, pool: EmbeddedPool) -> None:
    """Ranges that are equal, nested, and overlapping, over several blocks of a read."""
    whole = torch.arange(3 << 20, dtype=torch.float32)
    table = whole.view(3, -1)
    tensors = {
        "lm_head.weight": whole, "embed.weight": whole, "layers.0.q": table[0], "layers.0.kv": table[1:],
        "layers.0.cross": whole[1000:2_500_000], "layers.0.scalar": whole[7], "layers.0.none": whole[5:5],
        "alone": torch.ones(3),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "m.pth")
    assert_served(tmp_path / "m.pth", tensors)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8))
def test_any_parts_of_a_storage(ranges: list[tuple[int, int]]) -> None:
    whole = torch.arange(40, dtype=torch.int16)
    tensors = {f"t{i}": whole[min(pair) : max(pair)] for i, pair in enumerate(ranges)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.pt"
        torch.save(tensors, path)
        manifest, raw = open_checkpoint(path), path.read_bytes()
    for tensor in manifest.tensors:
        data = raw[tensor.file_offset :][: tensor.nbytes]
        assert torch.frombuffer(bytearray(data or b"\0\0"), dtype=torch.int16)[: tensor.shape[0]].tolist() == (
            tensors[tensor.name].tolist()
        )


def test_a_training_checkpoint_is_flattened(tmp_path: Path, pool: EmbeddedPool) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save(
        {"state_dict": module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "name": "v\u00e9"},
        tmp_path / "last.ckpt",
    )
    manifest = open_checkpoint(tmp_path / "last.ckpt")
    names = {"state_dict.weight", "state_dict.bias"}
    state = {f"optimizer.state.{i}.{field}" for i in (0, 1) for field in ("step", "exp_avg", "exp_avg_sq")}
    assert manifest.by_name.keys() == names | state
    metadata = manifest.files[0].metadata
    assert metadata is not None
    assert (metadata["epoch"], metadata["name"], metadata["optimizer.param_groups.0.lr"]) == ("3", "v\u00e9", "0.001")
    assert same(tiermem.torch.load_model(tmp_path)["state_dict.weight"], module.weight)


def test_indexed_shards(tmp_path: Path, pool: EmbeddedPool) -> None:
    tensors = {f"layers.{i}.w": torch.full((3,), i) for i in range(4)}
    homes = {name: f"pytorch_model-0000{1 + i // 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for home in set(homes.values()):
        torch.save({name: tensors[name] for name in tensors if homes[name] == home}, tmp_path / home)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": homes}))
    torch.save({"decoy": torch.ones(1)}, tmp_path / "scheduler.pt")
    assert_served(tmp_path, tensors)
    assert_served(tmp_path / "pytorch_model.bin.index.json", tensors)


def test_safetensors_beside_it_win(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).by_name) == ["a"]
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).by_name) == ["b"]


def test_a_blob_without_an_ending_is_told_by_its_content(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.bin")
    os.rename(tmp_path / "m.bin", tmp_path / "d1f2")
    assert list(open_checkpoint(tmp_path / "d1f2").by_name) == ["a"]


class Custom:
    pass


REFUSED: dict[str, tuple[Any, str]] = {
    "module": (torch.nn.Linear(2, 2), "names 'torch.nn.modules.linear.Linear'"),
    "object": ({"a": Custom()}, r"names '\S*Custom'"),
    "transposed": ({"a": torch.ones(2, 3).t()}, "'a' of shape .3, 2. has strides .1, 3. and so is not contiguous"),
    "conjugate": ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "conjugate or negative bit"),
    "sparse": ({"a": torch.eye(2).to_sparse()}, "_rebuild_sparse_tensor"),
    "complex128": ({"a": torch.ones(2, dtype=torch.complex128)}, "names 'torch.ComplexDoubleStorage'"),
    "meta": ({"a": torch.ones(2, device="meta")}, "_rebuild_meta_tensor_no_storage"),
    "tensor": (torch.ones(2), "holds a StoredTensor"),
    "tuple as key": ({("a", "b"): torch.ones(2)}, "a dict with the key"),
    "ambiguous": ({"a.b": torch.ones(1), "a": OrderedDict(b=torch.ones(1))}, "two entries have the name 'a.b'"),
}


@pytest.mark.parametrize(("value", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_tensor_is_refused(value: Any, words: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.pt")


def test_the_old_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before torch 1\.6; convert it: python -c 'import sys, torch"):
        open_checkpoint(tmp_path / "m.pt")
