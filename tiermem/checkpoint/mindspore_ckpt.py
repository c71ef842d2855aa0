"""MindSpore checkpoints (`mindspore.save_checkpoint`, .ckpt): one file -> its facts and raw tensors. Reads no tensor.

The file is a protobuf message, `checkpoint.proto` of MindSpore:

    message Checkpoint { message Value { required string tag = 1; oneof value { TensorProto tensor = 2;
                                                                                MapTensorProto maptensor = 3; } }
                         repeated Value value = 1; }
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

`crc_check=True` appends `crc_num` and ten bytes, which are not compared: a pool digests every tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Span, Unusable, open_header
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.protobuf import BYTES, Field, fields, integers, text
from tiermem.checkpoint.sizes import nbytes_of
from tiermem.checkpoint.strict_json import shown
from tiermem.types import CheckpointFile

ENDING = ".ckpt"
SLICED = "tiermem.sliced."
"""What the metadata's key of a tensor in slices begins with, before its tag."""

_MAX_TENSORS = 1 << 17
_MAX_NAME_BYTES = 4096
_MAX_TYPE_BYTES = 64
_MAX_STRING_BYTES = 16 << 10
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

    A tensor in slices, as MindSpore writes those above 512 MiB, comes as one tensor of one dimension per slice,
    `TAG.slice.0` and so on, and the file's metadata has the shape of the whole, `[80000, 4096]`, as
    `tiermem.sliced.TAG`. Strings are in the metadata; of long ones it says that they were left out:
    `tiermem.skipped.TAG`. Raises CheckpointError (malformed, encrypted, of a type that is not read),
    CheckpointNotFound, CheckpointChanged, AccessDenied, ReadError.
    """
    with open_header(path) as (cursor, facts):
        if cursor.peek(4) in _ENCRYPTED:
            raise Unusable(f"is an encrypted MindSpore checkpoint; load it with its key, and {_AS_SAFETENSORS}")
        metadata: dict[str, str] = {}
        tensors: dict[str, RawTensor] = {}
        for tag, of_tag in groupby(_values(cursor), lambda value: value.tag):
            slices = list(of_tag)
            if slices[0].dtype == _STRING and len(slices) == 1:
                metadata |= _string(cursor, slices[0])
                continue
            found = _raw(slices, number)
            if len(slices) > 1:
                metadata[SLICED + tag] = str(list(slices[0].shape))
            for tensor in found:
                if tensor.name in tensors:
                    raise ValueError(f"tensor {shown(tensor.name)} is in the file twice, with others between")
                tensors[tensor.name] = tensor
            if len(tensors) > _MAX_TENSORS:
                raise ValueError(f"the file has more than {_MAX_TENSORS} tensors, more than any sane one")
        return CheckpointFile(path, *facts, cursor.digest, metadata or None), list(tensors.values())


def _end(cursor: Cursor) -> int:
    """Where the message ends."""
    if cursor.size < _CRC_BYTES:
        return cursor.size
    cursor.at = cursor.size - _CRC_BYTES
    return cursor.at if cursor.peek(len(_CRC)) == _CRC else cursor.size


def _values(cursor: Cursor) -> Iterator[_Value]:
    for field in fields(cursor, Span(0, _end(cursor))):
        if field.number != _VALUE or field.wire != BYTES:
            raise ValueError(f"byte {field.span.start}: protobuf field {field.number} is no value of a checkpoint")
        yield _value(cursor, field.span)


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


def _string(cursor: Cursor, value: _Value) -> dict[str, str]:
    """A string as metadata; numpy wrote it, so it is in UTF-32."""
    if value.content.length > _MAX_STRING_BYTES or value.tag.startswith("tiermem."):
        return {f"tiermem.skipped.{value.tag}": _STRING}
    cursor.at = value.content.start
    return {value.tag: cursor.take(value.content.length).decode("utf-32-le").rstrip("\0")}


def _raw(slices: Sequence[_Value], number: int) -> list[RawTensor]:
    """The tensor of these slices, which are all of one tag, or a tensor for each of several."""
    tag, kind, shape, content = slices[0]
    if kind not in _DTYPES:
        raise Unusable(f"tensor {shown(tag)} has the type {shown(kind)}, which is not read; {_AS_SAFETENSORS}")
    dtype, length = _DTYPES[kind], sum(value.content.length for value in slices)
    element = nbytes_of(tag, dtype, ())
    if shape == (0,) and length == element:
        shape = ()  # as MindSpore before 2.0 writes scalars, and later ones still read them
    nbytes = nbytes_of(tag, dtype, shape)
    several = f" in {len(slices)} slices" if len(slices) > 1 else ""
    if length != nbytes:
        raise ValueError(
            f"tensor {shown(tag)} of type {kind} and shape {shown(shape)} takes {nbytes} bytes, but has "
            f"{length}{several}"
        )
    if not several:
        return [RawTensor(tag, dtype, shape, number, content.start, nbytes)]
    raw = []
    for i, value in enumerate(slices):
        if (value.dtype, value.shape) != (kind, shape) or value.content.length % element:
            raise ValueError(
                f"tensor {shown(tag)} has slices of type {kind} and shape {shown(shape)}, but slice {i} has type "
                f"{shown(value.dtype)}, shape {shown(value.shape)} and {value.content.length} bytes"
            )
        count = value.content.length // element
        raw.append(RawTensor(f"{tag}.slice.{i}", dtype, (count,), number, value.content.start, value.content.length))
    return raw
