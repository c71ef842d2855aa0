"""The outline of an ONNX model: its protobuf, in which weights are named by file and offset instead of being held.

Keeps nodes, metadata and small tensors as they are, and never reads a weight. A runtime parses an outline in
milliseconds, whereas of a model with its weights inline it makes a private copy of all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Span, open_header
from tiermem.checkpoint.onnx import ENDING
from tiermem.checkpoint.protobuf import BYTES, VARINT, fields, integers, text
from tiermem.errors import Refused
from tiermem.types import Manifest

_LEAST_BYTES = 1024
"""Smaller tensors stay where they are: runtimes want the values of shapes and axes while they infer shapes."""
_MOST = 4096
"""Bytes of a name, and dimensions; what the pool serves has fewer."""

# Numbers of fields.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER = 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_IS_EXTERNAL = 1


class Weight(NamedTuple):
    """A tensor that the outline only names: ONNX's number of its type, and its shape in elements of that type."""

    data_type: int
    dims: tuple[int, ...]


class Outline(NamedTuple):
    """A serialised ModelProto, the directory that its locations of external data start from, and its weights."""

    proto: bytes
    directory: str
    weights: Mapping[str, Weight]


def outline_of(manifest: Manifest) -> Outline:
    """The outline of the ONNX model that the manifest was parsed from; the caller checks that it did not change since.

    Raises Refused where it is of another format, CheckpointError, CheckpointNotFound, CheckpointChanged, AccessDenied,
    ReadError.
    """
    path = manifest.files[0].path
    if not path.endswith(ENDING):
        raise Refused(f"{path}: is no ONNX model (*{ENDING}); read its tensors through tiermem.numpy or tiermem.torch")
    # Links are followed, because runtimes refuse external data outside of the directory that they are given.
    targets = [os.path.realpath(file.path) for file in manifest.files]
    directory = os.path.commonpath([os.path.dirname(target) for target in targets])
    external = {}
    for tensor in manifest.tensors:
        if tensor.file or tensor.nbytes >= _LEAST_BYTES:
            location = os.path.relpath(targets[tensor.file], directory)
            external[tensor.name] = _external(location, tensor.file_offset, tensor.nbytes)
    weights: dict[str, Weight] = {}
    with open_header(path) as (cursor, _):

        def tensor_without_bytes(message: Span) -> bytes | None:
            name, weight = _described(cursor, message)
            if name not in external:
                return None
            weights[name] = weight
            dims = b"".join(_number(_DIMS, size) for size in weight.dims)
            return dims + _number(_DATA_TYPE, weight.data_type) + _bytes(_NAME, name.encode()) + external[name]

        def graph_without_bytes(message: Span) -> bytes:
            return _rewritten(cursor, message, _GRAPH_INITIALIZER, tensor_without_bytes)

        proto = _rewritten(cursor, Span(0, cursor.size), _MODEL_GRAPH, graph_without_bytes)
    return Outline(proto, directory, weights)


def _rewritten(cursor: Cursor, message: Span, number: int, rewrite: Callable[[Span], bytes | None]) -> bytes:
    """The message with its fields of this number rewritten, where `rewrite` gives not None; all else as it is."""
    parts = []
    copied = end = message.start
    for field in fields(cursor, message):
        if field.number == number and field.wire == BYTES and (body := rewrite(field.span)) is not None:
            parts += [_copy(cursor, Span(copied, end)), _bytes(number, body)]
            copied = field.span.end
        end = field.span.end
    return b"".join((*parts, _copy(cursor, Span(copied, end))))


def _described(cursor: Cursor, message: Span) -> tuple[str, Weight]:
    name, data_type = "", 0
    dims: list[int] = []
    for field in fields(cursor, message):
        if field.number == _NAME:
            name = text(cursor, field, _MOST)
        elif field.number == _DATA_TYPE:
            data_type = field.value
        elif field.number == _DIMS:
            dims += integers(cursor, field, _MOST)
    return name, Weight(data_type, tuple(dims))


def _external(location: str, offset: int, nbytes: int) -> bytes:
    """The fields of a TensorProto that say where its bytes are."""
    entries = {"location": location, "offset": str(offset), "length": str(nbytes)}
    told = [
        _bytes(_EXTERNAL, _bytes(_ENTRY_KEY, key.encode()) + _bytes(_ENTRY_VALUE, os.fsencode(value)))
        for key, value in entries.items()
    ]
    return b"".join((*told, _number(_LOCATION, _IS_EXTERNAL)))


def _copy(cursor: Cursor, span: Span) -> bytes:
    cursor.at = span.start
    return cursor.take(span.length)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*encoded, value))
