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


def test_scalars_empty_tensors_strings_and_names(tmp_path: Path, pool: EmbeddedPool) -> None:
    path = saved(
        tmp_path / "m.ckpt", ("step", "Int32", (), b"\7\0\0\0"), ("none", "Float32", (0, 3), b""),
        ("old", "Float16", (0,), b"\0\x3c"), ("backbone.layers.3.\u00e9", "Int8", (1,), b"\1"),
        ("note", "str", (0,), "h\u00e9".encode("utf-32-le")), ("long", "str", (0,), bytes(20000)),
        ("tiermem.sliced.note", "str", (0,), "[1]".encode("utf-32-le")),
    )  # fmt: skip
    served = tiermem.numpy.load_model(path)
    assert {name: array.tolist() for name, array in served.items()} == {
        "step": 7, "none": [], "old": 1.0, "backbone.layers.3.\u00e9": [1]
    }  # fmt: skip
    manifest = open_checkpoint(path)
    assert manifest.files[0].metadata == {
        "note": "h\u00e9", "tiermem.skipped.long": "str", "tiermem.skipped.tiermem.sliced.note": "str"
    }  # fmt: skip
    assert "backbone.layers.3" in {segment.layer for segment in manifest.segments}


def test_slices_are_tensors_of_one_dimension_in_order(tmp_path: Path, pool: EmbeddedPool) -> None:
    whole = np.arange(1000, 1008, dtype=np.int16).reshape(2, 2, 2)
    parts = [whole.tobytes()[start : start + 6] for start in (0, 6, 12)]
    path = saved(
        tmp_path / "m.ckpt", ("a", "Int8", (1,), b"\5"), *(("layers.0.w", "Int16", (2, 2, 2), part) for part in parts),
        ("z", "Int8", (1,), b"\6"),
    )  # fmt: skip
    assert open_checkpoint(path).files[0].metadata == {"tiermem.sliced.layers.0.w": "[2, 2, 2]"}
    served = tiermem.numpy.load_model(path)
    assert {name: array.tolist() for name, array in served.items()} == {
        "a": [5], "layers.0.w.slice.0": [1000, 1001, 1002], "layers.0.w.slice.1": [1003, 1004, 1005],
        "layers.0.w.slice.2": [1006, 1007], "z": [6],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([("w", "Int8", (4,), b"\1\2"), ("w", "Int8", (4,), b"\3")], "takes 4 bytes, but has 3 in 2 slices"),
        ([("w", "Int8", (4,), b"\1\2"), ("w", "UInt8", (4,), b"\3\4")], "slice 1 has type 'UInt8'"),
        ([("w", "Int8", (4,), b"\1\2"), ("w", "Int8", (2, 2), b"\3\4")], r"slice 1 has .* shape \(2, 2\)"),
        ([("w", "Int16", (2,), b"\1"), ("w", "Int16", (2,), b"\2\3\4")], "slice 0 has .* 1 bytes"),
        ([("w", "Int8", (1,), b"\1"), ("v", "Int8", (1,), b"\1"), ("w", "Int8", (1,), b"\1")], "is in the file twice"),
        ([("w", "Int8", (2,), b"\1"), ("w", "Int8", (2,), b"\1"), ("w.slice.1", "Int8", (1,), b"\1")], "twice"),
        ([("w", "str", (0,), b"a\0\0\0"), ("w", "str", (0,), b"b\0\0\0")], "has the type 'str'"),
        ([("w", "str", (0,), b"\0\0\0\1")], "utf-32"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_together_are_refused(
    values: list[tuple[str, str, tuple[int, ...], bytes]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(saved(tmp_path / "m.ckpt", *values))
