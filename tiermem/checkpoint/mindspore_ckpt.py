"""MindSpore checkpoints (`mindspore.save_checkpoint`, .ckpt): one file -> its facts and raw tensors. Reads no tensor.

The file is a protobuf message, `checkpoint.proto` of MindSpore:

    message Checkpoint { message Value { required string tag = 1; oneof value { TensorProto tensor = 2;
                                                                                MapTensorProto maptensor = 3; } }
                         repeated Value value = 1; }
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

`crc_check=True` appends `crc_num` and ten bytes, which are not compared: a pool digests every tensor itself.
"""

from __future__ import annotations

from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Span, Unusable, open_header
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.protobuf import BYTES, Field, fields, integers, text
from tiermem.checkpoint.sizes import nbytes_of
from tiermem.checkpoint.strict_json import shown
from tiermem.types import CheckpointFile

ENDING = ".ckpt"

_MAX_TENSORS = 1 << 17
_MAX_NAME_BYTES = 4096
_MAX_TYPE_BYTES = 64
_MAX_DIMENSIONS = 64
_CRC, _CRC_BYTES = b"crc_num", 17
_ENCRYPTED = tuple(number.to_bytes(4, "little") for number in (0x7F3A5ED8, 0x7F3A5ED9, 0x7F3A5EDA))
"""What an encrypted file begins with (AES-GCM, AES-CBC, SM4-CBC), by `crypto.h` of MindSpore."""

# Numbers of fields.
_VALUE = 1
_TAG, _TENSOR, _MAP = 1, 2, 3
_DIMS, _TYPE, _CONTENT = 1, 2, 3

_AS_SAFETENSORS = "save it with mindspore.save_checkpoint(..., format='safetensors')"
_STRING = "str"
_DTYPES = {
    "Bool": "BOOL", "Int8": "I8", "UInt8": "U8", "Int16": "I16", "UInt16": "U16", "Int32": "I32", "UInt32": "U32",
    "Int64": "I64", "UInt64": "U64", "Float16": "F16", "BFloat16": "BF16", "Float32": "F32", "Float64": "F64",
    "Complex64": "C64",
}  # fmt: skip


class _Value(NamedTuple):
    tag: str
    dtype: str
    shape: tuple[int, ...]
    content: Span


def read_mindspore(path: str, number: int) -> tuple[CheckpointFile, list[RawTensor]]:
    """Facts and tensors, ordered by offset, of the MindSpore checkpoint at `path`, file `number` of a checkpoint.

    Strings are left out, and the file's metadata says so: `tiermem.skipped.TAG`. Raises CheckpointError (malformed,
    encrypted, of a type that is not read; a tensor in slices, as MindSpore writes those above 512 MiB),
    CheckpointNotFound, CheckpointChanged, AccessDenied, ReadError.
    """
    with open_header(path) as (cursor, facts):
        if cursor.peek(4) in _ENCRYPTED:
            raise Unusable(f"is an encrypted MindSpore checkpoint; load it with its key, and {_AS_SAFETENSORS}")
        metadata: dict[str, str] = {}
        tensors: dict[str, RawTensor] = {}
        for field in fields(cursor, Span(0, _end(cursor))):
            if field.number != _VALUE or field.wire != BYTES:
                raise ValueError(f"byte {field.span.start}: protobuf field {field.number} is no value of a checkpoint")
            value = _value(cursor, field.span)
            if value.tag in tensors:
                raise Unusable(f"tensor {shown(value.tag)} is in several slices, which are not read; {_AS_SAFETENSORS}")
            if len(tensors) == _MAX_TENSORS:
                raise ValueError(f"the file has more than {_MAX_TENSORS} tensors, more than any sane one")
            if value.dtype == _STRING:
                metadata[f"tiermem.skipped.{value.tag}"] = _STRING
            else:
                tensors[value.tag] = _raw(value, number)
        return CheckpointFile(path, *facts, cursor.digest, metadata or None), list(tensors.values())


def _end(cursor: Cursor) -> int:
    """Where the message ends."""
    if cursor.size < _CRC_BYTES:
        return cursor.size
    cursor.at = cursor.size - _CRC_BYTES
    return cursor.at if cursor.peek(len(_CRC)) == _CRC else cursor.size


def _value(cursor: Cursor, message: Span) -> _Value:
    tag: str | None = None
    tensor: Span | None = None
    for field in fields(cursor, message):
        if field.number == _TAG:
            tag = text(cursor, field, _MAX_NAME_BYTES)
        elif field.number == _TENSOR and field.wire == BYTES:
            tensor = field.span
        elif field.number == _MAP:
            raise Unusable(f"value {shown(tag)} is a map parameter, which is not read; save the checkpoint without it")
    if tag is None or tensor is None:
        raise ValueError(f"byte {message.start}: a value of the checkpoint has no tag or no tensor")
    return _tensor(cursor, tag, tensor)


def _tensor(cursor: Cursor, tag: str, message: Span) -> _Value:
    dims: list[int] = []
    dtype: str | None = None
    content: Field | None = None
    for field in fields(cursor, message):
        if field.number == _DIMS:
            dims += integers(cursor, field, _MAX_DIMENSIONS)
            if len(dims) > _MAX_DIMENSIONS:
                raise ValueError(f"tensor {shown(tag)} has more than {_MAX_DIMENSIONS} dimensions")
        elif field.number == _TYPE:
            dtype = text(cursor, field, _MAX_TYPE_BYTES)
        elif field.number == _CONTENT:
            content = field
    if dtype is None or content is None or content.wire != BYTES:
        raise ValueError(f"tensor {shown(tag)} has no type or no content")
    return _Value(tag, dtype, tuple(dims), content.span)


def _raw(value: _Value, number: int) -> RawTensor:
    tag, dtype, shape, content = value
    if dtype not in _DTYPES:
        raise Unusable(f"tensor {shown(tag)} has the type {shown(dtype)}, which is not read; {_AS_SAFETENSORS}")
    nbytes = nbytes_of(tag, _DTYPES[dtype], shape)
    if content.length < nbytes:
        # The first slice of several; it has all of the tensor's dimensions.
        raise Unusable(
            f"tensor {shown(tag)} of type {dtype} and shape {shown(shape)} takes {nbytes} bytes, but has "
            f"{content.length}, so it is cut off or in several slices, which are not read; {_AS_SAFETENSORS}"
        )
    if content.length != nbytes:
        raise ValueError(
            f"tensor {shown(tag)} of type {dtype} and shape {shown(shape)} takes {nbytes} bytes, but has "
            f"{content.length}"
        )
    return RawTensor(tag, _DTYPES[dtype], shape, number, content.start, nbytes)
