"""MindSpore checkpoints, written by the protobuf library from MindSpore's message: what was saved, the pool serves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import tiermem.numpy
from tiermem.checkpoint import open_checkpoint
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CheckpointError

TYPES = {
    "Bool": np.bool_, "Int8": np.int8, "UInt8": np.uint8, "Int16": np.int16, "UInt16": np.uint16, "Int32": np.int32,
    "UInt32": np.uint32, "Int64": np.int64, "UInt64": np.uint64, "Float16": np.float16, "Float32": np.float32,
    "Float64": np.float64, "BFloat16": ml_dtypes.bfloat16, "Complex64": np.complex64,
}  # fmt: skip

Field = descriptor_pb2.FieldDescriptorProto


def _checkpoint() -> Any:
    """The class of `checkpoint.proto`'s Checkpoint, less the map parameters."""
    file = descriptor_pb2.FileDescriptorProto(name="checkpoint.proto", syntax="proto2")
    top = file.message_type.add(name="Checkpoint")
    value = top.nested_type.add(name="Value")
    tensor = file.message_type.add(name="TensorProto")
    one, many, needed = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED, Field.LABEL_REQUIRED
    top.field.add(name="value", number=1, label=many, type=Field.TYPE_MESSAGE, type_name=".Checkpoint.Value")
    value.field.add(name="tag", number=1, label=needed, type=Field.TYPE_STRING)
    value.field.add(name="tensor", number=2, label=one, type=Field.TYPE_MESSAGE, type_name=".TensorProto")
    tensor.field.add(name="dims", number=1, label=many, type=Field.TYPE_INT64)
    tensor.field.add(name="tensor_type", number=2, label=needed, type=Field.TYPE_STRING)
    tensor.field.add(name="tensor_content", number=3, label=needed, type=Field.TYPE_BYTES)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Checkpoint"))


CHECKPOINT = _checkpoint()


def saved(path: Path, *values: tuple[str, str, tuple[int, ...], bytes], end: bytes = b"") -> Path:
    """As MindSpore does, every value as a message of its own, one behind the other."""
    with path.open("wb") as file:
        for tag, kind, dims, content in values:
            message = CHECKPOINT()
            value = message.value.add(tag=tag)
            value.tensor.dims.extend(dims)
            value.tensor.tensor_type, value.tensor.tensor_content = kind, content
            file.write(message.SerializeToString())
        file.write(end)
    return path


@pytest.mark.parametrize("end", [b"", b"crc_num" + (1 << 31).to_bytes(10, "big")])
def test_every_type_is_served(end: bytes, tmp_path: Path, pool: EmbeddedPool) -> None:
    arrays = {kind: np.arange(5000).reshape(50, 100).astype(dtype) for kind, dtype in TYPES.items()}
    saved(tmp_path / "m.ckpt", *((kind, kind, array.shape, array.tobytes()) for kind, array in arrays.items()), end=end)
    served = tiermem.numpy.load_model(tmp_path)
    assert list(served) == list(arrays)
    for kind, array in arrays.items():
        assert served[kind].dtype == array.dtype
        assert np.array_equal(served[kind], array)


def test_scalars_empty_tensors_and_names(tmp_path: Path, pool: EmbeddedPool) -> None:
    path = saved(
        tmp_path / "m.ckpt", ("step", "Int32", (), b"\7\0\0\0"), ("none", "Float32", (0, 3), b""),
        ("backbone.layers.3.\u00e9", "Int8", (1,), b"\1"), ("note", "str", (), b"h\0\0\0"),
    )  # fmt: skip
    served = tiermem.numpy.load_model(path)
    assert {name: array.tolist() for name, array in served.items()} == {
        "step": 7, "none": [], "backbone.layers.3.\u00e9": [1]
    }  # fmt: skip
    manifest = open_checkpoint(path)
    assert manifest.files[0].metadata == {"tiermem.skipped.note": "str"}
    assert "backbone.layers.3" in {segment.layer for segment in manifest.segments}


def test_slices_are_refused_with_the_way_out(tmp_path: Path) -> None:
    halves = (("big", "Int8", (4,), b"\1\2"), ("big", "Int8", (4,), b"\3\4"))
    with pytest.raises(CheckpointError, match=r"tensor 'big'.*slices.*format='safetensors'"):
        open_checkpoint(saved(tmp_path / "m.ckpt", *halves))
