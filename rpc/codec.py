"""The wire form of messages: frozen dataclass <-> msgpack map, Manifest <-> msgpack columns. Never does I/O.

Decoding is strict, because a daemon decodes what strangers send: every byte is accounted for, and any deviation is a
ProtocolError that names the message and the field. Encoding leaves out fields that have their default value, so that an
older peer, which refuses fields that it does not know, meets a new one only when it is used.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from tiermem.errors import BY_CODE, ProtocolError, TiermemError
from tiermem.rpc.messages import Failure
from tiermem.types import DTYPE_BITS, TENSOR_ALIGN, CheckpointFile, Extent, Manifest, SegmentInfo, TensorInfo

MAX_MESSAGE_BYTES = 64 << 20
"""Larger messages are neither sent nor accepted."""

MAX_ERROR_BYTES = 3072
"""An error's text is cut to this: it travels in HTTP/2 trailers, of which gRPC accepts 8 KiB."""

T = TypeVar("T")
_Decoder = Callable[[Any], Any]


class _Mismatch(Exception):
    """A value is not of its type. `path` grows from the inside out while the stack unwinds, so success pays nothing."""

    def __init__(self, what: str, path: str = "") -> None:
        self.what, self.path = what, path

    def under(self, step: str) -> _Mismatch:
        self.path = step + self.path
        return self


def encode(message: object) -> bytes:
    """The msgpack map of a message. Raises ProtocolError if it holds what cannot be sent, or is too large."""
    kind = type(message).__name__
    try:
        data: bytes = msgpack.packb(message, default=_as_map)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"{kind} cannot be encoded: {error}") from None
    _check_size(kind, data)
    return data


def decode(kind: type[T], data: bytes) -> T:
    """The message of class `kind` that `data` holds. Raises ProtocolError for anything else."""
    _check_size(kind.__name__, data)
    try:
        value = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"{kind.__name__} is not msgpack: {str(error)[:200] or type(error).__name__}") from None
    try:
        message: T = _record(kind)(value)
    except _Mismatch as mismatch:
        raise ProtocolError(f"{kind.__name__}{mismatch.path} {mismatch.what}") from None
    return message


def failure_of(error: TiermemError) -> Failure:
    """What of an error crosses the wire: its code and its text, cut to MAX_ERROR_BYTES."""
    text = str(error).encode("utf-8", "replace")[:MAX_ERROR_BYTES].decode("utf-8", "ignore")
    return Failure(error.code, text)


def error_of(failure: Failure) -> TiermemError:
    """The exception to raise for a failure; a code that this side does not know becomes TiermemError."""
    return BY_CODE.get(failure.code, TiermemError)(failure.message)


def _check_size(kind: str, data: bytes) -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"{kind} has {len(data)} bytes; a message may have {MAX_MESSAGE_BYTES}")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} is not of the protocol")


def _list_defaults(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((field.name, field.default) for field in dataclasses.fields(kind))


_defaults: Callable[[Any], tuple[tuple[str, Any], ...]] = cache(_list_defaults)


def _as_map(message: object) -> dict[str, Any]:
    """For msgpack's packer, which calls it for every value that is not plain."""
    values = ((name, getattr(message, name), default) for name, default in _defaults(type(message)))
    return {name: value for name, value, default in values if default is dataclasses.MISSING or value != default}


# --- decoders, one closure per type -------------------------------------------------------------------------------


def _describe(value: object) -> str:
    return {NoneType: "nil", dict: "a map", tuple: "an array"}.get(type(value), type(value).__name__)


def _exact(kind: type[Any], word: str) -> _Decoder:
    # Identity of the type, not isinstance: bool is an int, and must not pass for one.
    def decode_exact(value: Any) -> Any:
        if type(value) is kind:
            return value
        raise _Mismatch(f"is {_describe(value)}, not {word}")

    return decode_exact


def _float(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise _Mismatch(f"is {_describe(value)}, not a number")
    if not math.isfinite(value):
        raise _Mismatch(f"is {value}, not a finite number")
    return float(value)


def _plain(value: Any) -> Any:
    if type(value) is dict:
        for key, entry in value.items():
            if type(key) is not str:
                raise _Mismatch(f"has the key {str(key)[:80]!r}, which is {_describe(key)}, not str")
            _plain(entry)
    elif type(value) is tuple:
        for entry in value:
            _plain(entry)
    elif type(value) not in (NoneType, bool, int, float, str, bytes):
        raise _Mismatch(f"holds {_describe(value)}, which is not plain data")
    return value


def _optional(item: _Decoder) -> _Decoder:
    return lambda value: None if value is None else item(value)


def _sequence(item: _Decoder) -> _Decoder:
    def decode_sequence(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple:
            raise _Mismatch(f"is {_describe(value)}, not an array")
        entries: list[Any] = []
        try:
            for entry in value:
                entries.append(item(entry))
        except _Mismatch as mismatch:
            raise mismatch.under(f"[{len(entries)}]") from None
        return tuple(entries)

    return decode_sequence


def _mapping(item: _Decoder) -> _Decoder:
    as_map, as_key = _exact(dict, "a map"), _exact(str, "str")

    def decode_mapping(value: Any) -> dict[str, Any]:
        return {as_key(key): item(entry) for key, entry in as_map(value).items()}

    return decode_mapping


def _compile_record(kind: type[Any]) -> _Decoder:
    hints = get_type_hints(kind)
    rows = [(name, default, _decoder(hints[name])) for name, default in _defaults(kind)]
    names = {name for name, _, _ in rows}
    as_map = _exact(dict, "a map")

    def decode_record(value: Any) -> Any:
        unread = len(as_map(value))
        arguments: list[Any] = []
        for name, default, item in rows:
            if name in value:
                try:
                    arguments.append(item(value[name]))
                except _Mismatch as mismatch:
                    raise mismatch.under(f".{name}") from None
                unread -= 1
            elif default is dataclasses.MISSING:
                raise _Mismatch("is missing", f".{name}")
            else:
                arguments.append(default)
        if unread:
            unknown = sorted(str(key)[:80] for key in value.keys() - names)
            raise _Mismatch(f"has unknown fields: {', '.join(unknown[:8])}")
        return kind(*arguments)

    return decode_record


_record: Callable[[Any], _Decoder] = cache(_compile_record)


def _decoder(hint: Any) -> _Decoder:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return _optional(_decoder(inner))
    if origin is tuple:
        return _sequence(_decoder(arguments[0]))
    if origin in (dict, Mapping):
        return _mapping(_decoder(arguments[1]))
    if dataclasses.is_dataclass(hint):
        return _record(hint)
    if hint in (float, Any):
        return _float if hint is float else _plain
    return _exact(hint, hint.__name__)


# --- manifest -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ManifestColumns:
    """A manifest, its tensors by column. A bytes column is a little-endian u64 a tensor, or what its comment says."""

    path: str
    identity: str
    files: tuple[CheckpointFile, ...]
    segments: tuple[SegmentInfo, ...]
    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # distinct ones
    dtype: bytes  # u8, index in dtypes
    rank: bytes  # u8
    dims: bytes  # u64, sum(rank) of them
    file: bytes
    file_offset: bytes
    segment: bytes
    offset: bytes
    length: bytes


def _pack(numbers: Iterable[int]) -> bytes:
    column = list(numbers)
    return struct.pack(f"<{len(column)}Q", *column)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes for decode_manifest. Raises ProtocolError if a number has no place in its column."""
    tensors = manifest.tensors
    dtypes = tuple(dict.fromkeys(tensor.dtype for tensor in tensors))
    code = {dtype: number for number, dtype in enumerate(dtypes)}
    try:
        columns = ManifestColumns(
            path=manifest.path,
            identity=manifest.identity,
            files=manifest.files,
            segments=manifest.segments,
            names=tuple(tensor.name for tensor in tensors),
            dtypes=dtypes,
            dtype=bytes(code[tensor.dtype] for tensor in tensors),
            rank=bytes(len(tensor.shape) for tensor in tensors),
            dims=_pack(dim for tensor in tensors for dim in tensor.shape),
            file=_pack(tensor.file for tensor in tensors),
            file_offset=_pack(tensor.file_offset for tensor in tensors),
            segment=_pack(tensor.extent.segment for tensor in tensors),
            offset=_pack(tensor.extent.offset for tensor in tensors),
            length=_pack(tensor.extent.length for tensor in tensors),
        )
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"the manifest of {manifest.path} cannot be encoded: {error}") from None
    return encode(columns)


def _numbers(field: str, data: bytes, count: int) -> tuple[int, ...]:
    if len(data) != 8 * count:
        raise ProtocolError(f"manifest.{field} holds {len(data)} bytes, not 8 for each of {count}")
    numbers = struct.unpack(f"<{count}Q", data)
    if max(numbers, default=0) >= 1 << 63:
        raise ProtocolError(f"manifest.{field} holds {max(numbers)}, which no file can hold")
    return numbers


def _indices(field: str, column: bytes | tuple[int, ...], count: int, total: int) -> bytes | tuple[int, ...]:
    if len(column) != count:
        raise ProtocolError(f"manifest.{field} has {len(column)} entries for {count} tensors")
    if max(column, default=-1) >= total:
        raise ProtocolError(f"manifest.{field} refers to number {max(column)} of {total}")
    return column


def _shapes(columns: ManifestColumns, count: int) -> list[tuple[int, ...]]:
    ranks = _indices("rank", columns.rank, count, 256)
    dims = _numbers("dims", columns.dims, sum(ranks))
    shapes, start = [], 0
    for rank in ranks:
        shapes.append(dims[start : start + rank])
        start += rank
    return shapes


def _instances(kind: type[T], count: int, *columns: Iterable[Any]) -> list[T]:
    """Instances of a frozen slots dataclass from its fields' columns, each slot filled for all of them in one C loop.

    Equal to calling the class, in a third of the time: a frozen __init__ calls object.__setattr__ for each field.
    """
    instances = list(map(kind.__new__, repeat(kind, count)))
    for (name, _), column in zip(_defaults(kind), columns, strict=True):
        deque(map(getattr(kind, name).__set__, instances, column), maxlen=0)
    return instances


def _check_extents(manifest: Manifest) -> None:
    """Every tensor lies within its file and its segment, aligned, and has the bytes that dtype and shape ask for.

    A dtype that is not of the safetensors format (a block quantisation) is taken at its length.
    """
    sizes = [file.size for file in manifest.files]
    rooms = [segment.length for segment in manifest.segments]
    for tensor in manifest.tensors:
        extent, bits = tensor.extent, DTYPE_BITS.get(tensor.dtype)
        length, offset = extent.length, extent.offset
        if offset + length > rooms[extent.segment] or offset % TENSOR_ALIGN:
            raise ProtocolError(f"manifest: {tensor.name} is misplaced: {extent} of {rooms[extent.segment]} bytes")
        if tensor.file_offset + length > sizes[tensor.file]:
            raise ProtocolError(f"manifest: {tensor.name} lies beyond the end of file {tensor.file}")
        if bits is not None and math.prod(tensor.shape) * bits != length * 8:
            raise ProtocolError(f"manifest: {tensor.name} of {tensor.dtype}{list(tensor.shape)} has {length} bytes")


def decode_manifest(data: bytes) -> Manifest:
    """The manifest that encode_manifest encoded. Raises ProtocolError unless every column agrees with every other."""
    columns = decode(ManifestColumns, data)
    count = len(columns.names)
    if any(segment.length < 0 for segment in columns.segments) or any(file.size < 0 for file in columns.files):
        raise ProtocolError("manifest: a file or segment has a negative length")
    dtypes = _indices("dtype", columns.dtype, count, len(columns.dtypes))
    files = _indices("file", _numbers("file", columns.file, count), count, len(columns.files))
    segments = _indices("segment", _numbers("segment", columns.segment, count), count, len(columns.segments))
    offsets, lengths = _numbers("offset", columns.offset, count), _numbers("length", columns.length, count)
    tensors = _instances(
        TensorInfo,
        count,
        columns.names,
        map(columns.dtypes.__getitem__, dtypes),
        _shapes(columns, count),
        files,
        _numbers("file_offset", columns.file_offset, count),
        _instances(Extent, count, segments, offsets, lengths),
    )
    manifest = Manifest(columns.path, columns.identity, columns.files, columns.segments, tuple(tensors))
    if len(manifest.by_name) != count:
        raise ProtocolError("manifest.names has a name twice")
    _check_extents(manifest)
    return manifest
