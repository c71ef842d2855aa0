"""Whatever checkpoint safetensors can write, tiermem's readers give the same of it, with a daemon and without one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import TensorSpec, serialize_file

import tiermem.numpy
import tiermem.torch
from tiermem import opening
from tiermem.client import shared_client
from tiermem.config import load_config
from tiermem.embedded import EmbeddedPool
from tiermem.safe_open import safe_open
from tiermem.types import DTYPE_BITS

REPOSITORY = Path(__file__).resolve().parents[2]
SHARDS = ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors")
IN_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
WRITABLE = IN_NUMPY | {
    "BF16": "bfloat16", "F4": "float4_e2m1fn_x2", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
"""Name in the format -> name that safetensors' writer takes."""

Raw = tuple[str, tuple[int, ...], bytes]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a daemon process."""
    home = tmp_path_factory.mktemp("daemon")
    address = f"unix:{home}/tm.sock"
    arguments = ["--address", address, "--state", f"{home}/state", "--digests", f"{home}/digests",
                 "--tier", "dram=1GiB"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "tiermem", "serve", *arguments], cwd=REPOSITORY)
    try:
        while not (home / "tm.sock").exists():
            assert process.poll() is None, "the daemon ended before it served"
            time.sleep(0.02)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(params=["embedded", "daemon"])
def pool(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What this process's readers open their files through: a pool of its own, or the daemon."""
    monkeypatch.setenv("TIERMEM_DIGESTS", str(tmp_path / "digests"))
    monkeypatch.setenv("TIERMEM_TIER", "dram=256MiB")
    with ExitStack() as stack:
        if request.param == "daemon":
            monkeypatch.setenv("TIERMEM_ADDRESS", request.getfixturevalue("daemon"))
            yield stack.enter_context(shared_client())
        else:
            monkeypatch.setenv("TIERMEM_ADDRESS", f"unix:{tmp_path}/none.sock")
            own = stack.enter_context(EmbeddedPool(load_config()))
            monkeypatch.setattr(opening, "_own", own)
            monkeypatch.setattr(opening, "_own_pid", os.getpid())
            yield own


def raw_tensors(dtypes: Mapping[str, str]) -> st.SearchStrategy[Raw]:
    @st.composite
    def draw_one(draw: st.DrawFn) -> Raw:
        dtype = draw(st.sampled_from(sorted(dtypes)))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        if dtype == "F4":
            shape = (*shape, 2)
        data = draw(st.randoms()).randbytes(math.prod(shape) * DTYPE_BITS[dtype] // 8)
        return dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data

    return draw_one()


def checkpoints(dtypes: Mapping[str, str]) -> st.SearchStrategy[dict[str, tuple[str, Raw]]]:
    """Tensor name -> (shard, tensor)."""
    leaf = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
    names = leaf | st.builds("model.layers.{}.{}".format, st.integers(0, 3), leaf)
    return st.dictionaries(names, st.tuples(st.sampled_from(SHARDS), raw_tensors(dtypes)), min_size=1, max_size=10)


def write(directory: Path, checkpoint: Mapping[str, tuple[str, Raw]]) -> list[Path]:
    """Write the shards and their index; returns the shards."""
    shards = sorted({shard for shard, _ in checkpoint.values()})
    for shard in shards:
        held = {name: raw for name, (home, raw) in checkpoint.items() if home == shard}
        arrays = {name: np.frombuffer(data or b"\0", np.uint8) for name, (_, _, data) in held.items()}
        specs = {}
        for name, (dtype, shape, data) in held.items():
            # The writer takes the shape in storage, where one element holds two F4.
            stored = (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape
            pointer = arrays[name].ctypes.data
            specs[name] = TensorSpec(dtype=WRITABLE[dtype], shape=list(stored), data_ptr=pointer, data_len=len(data))
        serialize_file(specs, directory / shard, {"shard": shard})
    index = {"metadata": {}, "weight_map": {name: shard for name, (shard, _) in checkpoint.items()}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return [directory / shard for shard in shards]


def seen(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Name -> type, dtype, shape and bytes of a tensor."""
    found = {}
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        data = flat.tobytes() if isinstance(flat, np.ndarray) else flat.view(torch.uint8).numpy().tobytes()
        found[name] = (type(tensor), tensor.dtype, tuple(tensor.shape), data)
    return found


def check(shards: list[Path], framework: str, module: Any) -> None:
    """Ours equals theirs: file by file, tensor by tensor, and the directory as a whole."""
    whole: dict[str, tuple[Any, ...]] = {}
    for shard in shards:
        with safetensors.safe_open(shard, framework) as theirs, safe_open(shard, framework) as ours:
            expected = seen(theirs.get_tensors())
            assert seen(ours.get_tensors()) == expected
            assert (ours.keys(), ours.metadata()) == (theirs.keys(), theirs.metadata())
            for name in theirs.keys():  # noqa: SIM118 (the original is no mapping)
                mine, other = ours.get_slice(name), theirs.get_slice(name)
                assert (mine.get_shape(), mine.get_dtype()) == (other.get_shape(), other.get_dtype())
                assert seen({name: ours.get_tensor(name)})[name] == expected[name]
        assert seen(module.load_file(shard)) == expected
        whole |= expected
    for writable in (True, False):
        assert seen(module.load_model(shards[0].parent, writable=writable)) == whole


FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(checkpoint=checkpoints(WRITABLE))
def test_torch_gets_what_safetensors_gives(pool: Any, checkpoint: dict[str, tuple[str, Raw]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        check(write(Path(directory), checkpoint), "pt", tiermem.torch)


@FEW
@given(checkpoint=checkpoints(IN_NUMPY))
def test_numpy_gets_what_safetensors_gives(pool: Any, checkpoint: dict[str, tuple[str, Raw]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        check(write(Path(directory), checkpoint), "np", tiermem.numpy)


def test_the_readers_went_through_the_pool(pool: Any, tmp_path: Path) -> None:
    raw: Raw = ("F32", (2,), bytes(8))
    shards = write(tmp_path, {"a": (SHARDS[0], raw), "b": (SHARDS[1], raw)})
    before = {model["name"] for model in pool.status()["models"]}
    tensors = tiermem.torch.load_model(tmp_path)
    tensors |= tiermem.torch.load_file(shards[1])
    (model,) = [model for model in pool.status()["models"] if model["name"] not in before]
    assert (model["path"], model["opens"], list(model["readers"])) == (str(tmp_path), 2, [os.getpid()])


def test_an_open_file_is_the_reader_s_and_not_the_daemon_s(pool: Any, tmp_path: Path) -> None:
    raw: Raw = ("U8", (3,), b"abc")
    (shard,) = write(tmp_path, {"a": (SHARDS[0], raw)})
    fd = os.memfd_create("weights")
    try:
        os.write(fd, shard.read_bytes())
        for file in (f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"):
            assert tiermem.numpy.load_file(file)["a"].tobytes() == b"abc"
    finally:
        os.close(fd)
