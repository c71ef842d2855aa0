"""ONNX models: the initializers of a model's main graph -> files and raw tensors. Reads no graph and no tensor bytes.

After `onnx.proto` (IR version 13). A tensor's bytes are in the model itself (raw_data, or packed floats) or in a file
beside it (external_data); both are little-endian. Numbers that protobuf packs as varints have no bytes to be loaded:
those initializers, strings and sparse ones are left out, and the model's metadata says so:
`tiermem.skipped.NAME` -> `int64_data`. Types of less than a byte come as U8, with what they are as `tiermem.onnx.NAME`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Span, Unusable, open_header
from tiermem.checkpoint.file import regular_file
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.protobuf import BYTES, VARINT, Field, fields, integers, text
from tiermem.checkpoint.sizes import bits_of, nbytes_of
from tiermem.checkpoint.strict_json import shown
from tiermem.types import CheckpointFile

ENDING = ".onnx"

_MAX_TENSORS = 1 << 17
_MAX_FILES = 256
"""Each is held open by a load, twice."""
_MAX_NAME_BYTES = 4096
_MAX_DIMENSIONS = 64
_MAX_DIGITS = 19
_NO_HEADER = ""

# Numbers of fields.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_SPARSE = 5, 15
_DIMS, _DATA_TYPE, _SEGMENT, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 8, 9, 13, 14
_TYPED = {4: "float_data", 5: "int32_data", 6: "string_data", 7: "int64_data", 10: "double_data", 11: "uint64_data"}
_PACKED = {4: "F32", 10: "F64"}
"""Fields whose packed numbers are laid out as the tensor is."""
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_IS_EXTERNAL = 1
_EXTERNAL_NUMBERS = ("offset", "length")

_DTYPES = {
    1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
    13: "U64", 14: "C64", 16: "BF16", 17: "F8_E4M3", 18: "F8_E4M3FNUZ", 19: "F8_E5M2", 20: "F8_E5M2FNUZ", 24: "F8_E8M0",
}  # fmt: skip
_SMALL = {21: ("UINT4", 4), 22: ("INT4", 4), 23: ("FLOAT4E2M1", 4), 25: ("UINT2", 2), 26: ("INT2", 2)}
"""Types that are packed into bytes, and their bits."""


class _Tensor(NamedTuple):
    """A TensorProto. `inline` is where its bytes lie in the model; `typed` are the fields of numbers that it has."""

    name: str
    data_type: int
    dims: tuple[int, ...]
    inline: Span | None
    external: dict[str, str] | None
    typed: tuple[Field, ...]


def read_onnx(path: str) -> tuple[list[CheckpointFile], list[RawTensor]]:
    """The model's file and those of its external data, and the tensors, ordered by file and offset.

    A file of external data lies in the model's directory or below it, links followed; where the model itself is a
    link, as in a hub cache, in the directory of its target or below that. Raises CheckpointError (malformed, outside
    the directory, of a type that is not read), CheckpointNotFound, CheckpointChanged, AccessDenied, ReadError.
    """
    with open_header(path) as (cursor, facts):
        metadata: dict[str, str] = {}
        homes = _Homes(path)
        raw: list[RawTensor] = []
        names: set[str] = set()
        for tensor in _initializers(cursor, metadata):
            if tensor.name in names or len(names) == _MAX_TENSORS:
                raise ValueError(f"tensor {shown(tensor.name)} occurs twice, or is one of more than {_MAX_TENSORS}")
            names.add(tensor.name)
            if (placed := _raw(tensor, facts.size, homes, metadata)) is not None:
                raw.append(placed)
        raw.sort(key=lambda tensor: (tensor.file, tensor.file_offset, tensor.nbytes))
        return [CheckpointFile(path, *facts, cursor.digest, metadata or None), *homes.files], raw


class _Homes:
    """The files of external data, opened once each: location -> number and size."""

    def __init__(self, model: str) -> None:
        self.files: list[CheckpointFile] = []
        self._folder = os.path.dirname(model)
        self._roots = (os.path.realpath(self._folder), os.path.dirname(os.path.realpath(model)))
        self._known: dict[str, int] = {}

    def find(self, tensor: str, location: str) -> tuple[int, int]:
        """(number, size) of the file at `location`. Raises ValueError where it is outside the model's directory."""
        if location not in self._known:
            if len(self.files) == _MAX_FILES:
                raise Unusable(f"has more than {_MAX_FILES} files of external data; save it with all tensors in one")
            path = os.path.join(self._folder, location)
            if not self._is_inside(location, path):
                raise ValueError(f"tensor {shown(tensor)} should be in {shown(location)}, which is outside the model")
            if not os.path.exists(path):
                raise ValueError(f"tensor {shown(tensor)} is said to be in {shown(location)}, which is missing")
            with regular_file(path) as (_, facts):
                self.files.append(CheckpointFile(path, *facts, _NO_HEADER))
            self._known[location] = len(self.files)
        number = self._known[location]
        return number, self.files[number - 1].size

    def _is_inside(self, location: str, path: str) -> bool:
        if not location or os.path.isabs(location) or ".." in location.split("/") or "\0" in location:
            return False
        target = os.path.realpath(path)
        return any(os.path.commonpath((root, target)) == root for root in self._roots)


def _initializers(cursor: Cursor, metadata: dict[str, str]) -> Iterator[_Tensor]:
    graphs = [field.span for field in fields(cursor, Span(0, cursor.size)) if _is(field, _MODEL_GRAPH)]
    if len(graphs) != 1:
        raise ValueError(f"has {len(graphs)} graphs and not one, so this is no ONNX model")
    sparse = 0
    for field in fields(cursor, graphs[0]):
        if _is(field, _GRAPH_INITIALIZER):
            yield _tensor(cursor, field.span)
        elif _is(field, _GRAPH_SPARSE):
            sparse += 1
    if sparse:
        metadata["tiermem.skipped"] = f"{sparse} sparse initializers"


def _is(field: Field, number: int) -> bool:
    """Whether the field has this number; one that has it has to be a message or bytes. Raises ValueError."""
    if field.number == number and field.wire != BYTES:
        raise ValueError(f"byte {field.span.start}: protobuf field {number} has wire type {field.wire}")
    return field.number == number


def _tensor(cursor: Cursor, message: Span) -> _Tensor:
    name, data_type, is_external = "", 0, False
    dims: list[int] = []
    typed: list[Field] = []
    inline: Span | None = None
    external: dict[str, str] = {}
    for field in fields(cursor, message):
        if field.number == _DIMS:
            dims += integers(cursor, field, _MAX_DIMENSIONS)
            if len(dims) > _MAX_DIMENSIONS:
                raise ValueError(f"byte {message.start}: a tensor has more than {_MAX_DIMENSIONS} dimensions")
        elif field.number in (_DATA_TYPE, _LOCATION) and field.wire == VARINT:
            data_type = field.value if field.number == _DATA_TYPE else data_type
            is_external = field.value == _IS_EXTERNAL if field.number == _LOCATION else is_external
        elif field.number == _NAME:
            name = text(cursor, field, _MAX_NAME_BYTES)
        elif _is(field, _RAW):
            inline = field.span
        elif _is(field, _EXTERNAL):
            external |= _entry(cursor, field.span)
        elif field.number in _TYPED:
            # One by one, as proto2 packs nothing unless told to, there may be a million; two tell as much.
            typed = [*typed[:1], field]
        elif field.number == _SEGMENT:
            raise Unusable(f"byte {message.start}: a tensor is stored in segments; save the model with whole tensors")
    return _Tensor(name, data_type, tuple(dims), inline, external if is_external else None, tuple(typed))


def _entry(cursor: Cursor, message: Span) -> dict[str, str]:
    key, value = "", ""
    for field in fields(cursor, message):
        if field.number == _ENTRY_KEY:
            key = text(cursor, field, _MAX_NAME_BYTES)
        elif field.number == _ENTRY_VALUE:
            value = text(cursor, field, _MAX_NAME_BYTES)
    return {key: value}


def _raw(tensor: _Tensor, model_size: int, homes: _Homes, metadata: dict[str, str]) -> RawTensor | None:
    """Where the tensor's bytes are, or None where it has none that can be loaded. Raises ValueError."""
    if tensor.inline is None and tensor.external is None and tensor.typed:
        field = tensor.typed[0]
        is_one_run = len(tensor.typed) == 1 and field.wire == BYTES and field.number in _PACKED
        if not (is_one_run and _PACKED[field.number] == _DTYPES.get(tensor.data_type)):
            metadata[f"tiermem.skipped.{tensor.name}"] = _TYPED[field.number]
            return None
        tensor = tensor._replace(inline=field.span)
    dtype, shape, nbytes = _measured(tensor, metadata)
    if tensor.external is not None:
        if tensor.inline is not None:
            raise ValueError(f"tensor {shown(tensor.name)} has both raw and external data")
        number, offset = _external(tensor.name, tensor.external, nbytes, homes)
        return RawTensor(tensor.name, dtype, shape, number, offset, nbytes)
    span = tensor.inline or Span(model_size, model_size)
    if span.length != nbytes:
        raise ValueError(
            f"tensor {shown(tensor.name)} of dtype {dtype} and shape {shown(shape)} takes {nbytes} bytes, but has "
            f"{span.length}"
        )
    return RawTensor(tensor.name, dtype, shape, 0, span.start, nbytes)


def _measured(tensor: _Tensor, metadata: dict[str, str]) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes."""
    name, number = tensor.name, tensor.data_type
    if number in _DTYPES:
        return _DTYPES[number], tensor.dims, nbytes_of(name, _DTYPES[number], tensor.dims)
    if number not in _SMALL:
        raise Unusable(f"tensor {shown(name)} has ONNX data type {number}, which is not read; save it as another type")
    true_type, bits = _SMALL[number]
    nbytes = -(-bits_of(name, bits, tensor.dims) // 8)
    metadata[f"tiermem.onnx.{name}"] = f"{true_type} {list(tensor.dims)}"
    return "U8", (nbytes,), nbytes


def _external(name: str, entries: dict[str, str], nbytes: int, homes: _Homes) -> tuple[int, int]:
    """(file number, offset) of external data."""
    numbers = {}
    for key in _EXTERNAL_NUMBERS:
        digits = entries.get(key)
        if digits is not None:
            if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS):
                raise ValueError(f"tensor {shown(name)} has external data with the {key} {shown(digits)}")
            numbers[key] = int(digits)
    number, size = homes.find(name, entries.get("location", ""))
    offset, length = numbers.get("offset", 0), numbers.get("length", nbytes)
    if length != nbytes or offset + nbytes > size:
        raise ValueError(
            f"tensor {shown(name)} takes {nbytes} bytes, but its external data has {length} from byte {offset} of a "
            f"file of {size}"
        )
    return number, offset
