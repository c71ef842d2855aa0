"""Frames: the format of a recording, to bytes and back. Never opens a file and knows no order of frames.

A file is MAGIC, then frames: a little-endian u32 length and a msgpack map {kind, time_s, fields of the kind}. `time_s`
and all other times are CLOCK_MONOTONIC of the host. FIELDS is the whole format; a reader passes over kinds and fields
that it does not know, so that later versions may add some.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

import msgpack
import numpy as np

from tiermem.errors import RecordingError
from tiermem.observations import Bits, Rung
from tiermem.samples import SAMPLE, Samples

MAGIC = b"tiermem recording\n"
VERSION = 1
MAX_FRAME_BYTES = 64 << 20
MAX_PLAIN_BYTES = 1 << 20
"""Only a byte string may take more of a frame: other values grow by up to 60 times when they are decoded."""

FIELDS: Mapping[str, Mapping[str, str]] = {
    "header": {"version": "count", "tiermem": "str", "host": "map", "config": "map", "command": "strs?",
               "unix_s": "number"},
    "model": {"id": "str", "name": "str", "manifest": "bytes"},
    "open": {"pid": "id", "model": "str", "lease": "str"},
    "release": {"pid": "id", "lease": "str"},
    "map": {"pid": "id", "lease": "str", "model": "str", "address": "count", "pages": "id"},
    "unmap": {"pid": "id", "lease": "str"},
    "process": {"pid": "id", "start_ticks": "count", "comm": "str"},
    "thread": {"pid": "id", "tid": "id", "comm": "str"},
    "exit": {"pid": "id"},
    "image": {"pid": "id", "address": "count", "nbytes": "count", "offset": "count", "path": "str"},
    "events": {"names": "strs", "periods": "counts", "rung": "rung"},
    "samples": {"data": "bytes"},
    "bits": {"pid": "id", "lease": "str", "model": "str", "rung": "rung", "begin_s": "time", "end_s": "time",
             "pages": "bytes", "touched": "bytes"},
    "counters": {"pid": "id?", "rung": "rung", "values": "numbers"},
    "load": {"model": "str", "seconds": "number", "nbytes": "count"},
    "move": {"model": "str", "first": "count", "pages": "count", "source": "int", "target": "int", "nbytes": "count",
             "reason": "str"},
    "end": {"reason": "str"},
}  # fmt: skip
"""Kind -> field -> type: a key of _TYPES, where `?` lets it be nil. A rung is its name in lower case. `samples.data`
holds rows of SAMPLE, whose `event` counts in the `events` frame before it. `bits.pages` is little-endian int32,
ascending; `bits.touched` has one bit a page, the first page's in the lowest bit of the first byte."""

_LENGTH = struct.Struct("<I")
_MAX_TIME_S = 1e9  # as nanoseconds it fits in 63 bits
_BYTES_CODES = (0xC4, 0xC5, 0xC6)
_MAX_FIELDS = 64


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _int_below(limit: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and 0 <= value < limit


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) in (list, tuple) and all(map(fits, value))


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: type(value) is str,
    "bytes": lambda value: type(value) is bytes,
    "int": lambda value: type(value) is int,
    "id": _int_below(1 << 31),
    "count": _int_below(1 << 63),
    "number": _number,
    "time": lambda value: _number(value) and 0 <= value < _MAX_TIME_S,
    "rung": lambda value: type(value) is str and value.islower() and value.upper() in Rung.__members__,
    "map": lambda value: type(value) is dict,
    "numbers": lambda value: type(value) is dict and all(map(_number, value.values())),
    "strs": _list_of(lambda value: type(value) is str),
    "counts": _list_of(_int_below(1 << 63)),
}


def _fits(value: Any, type_name: str) -> bool:
    return (value is None and type_name.endswith("?")) or _TYPES[type_name.removesuffix("?")](value)


def frame(kind: str, time_s: float, **fields: Any) -> bytes:
    """The bytes of one frame. Raises ValueError where kind, fields or time are not as FIELDS says: a mistake of the
    caller's."""
    types = FIELDS.get(kind)
    if types is None or fields.keys() != types.keys():
        raise ValueError(f"a recording has no frame {kind!r} of {sorted(fields)}; FIELDS lists what it has")
    for name, type_name, value in [("time_s", "time", time_s), *((n, t, fields[n]) for n, t in types.items())]:
        if not _fits(value, type_name):
            raise ValueError(f"{kind}.{name} is {value!r:.80}, not of type {type_name!r}")
    body = msgpack.packb({"kind": kind, "time_s": time_s, **fields}, unicode_errors="surrogateescape")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame {kind!r} has {len(body)} bytes; a frame takes {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(body)) + bytes(body)


def bits_frame(time_s: float, pid: int, lease: str, model: str, bits: Bits) -> bytes:
    """The frame of one window of one mapping."""
    return frame(
        "bits", time_s, pid=pid, lease=lease, model=model, rung=bits.rung.name.lower(), begin_s=bits.begin_s,
        end_s=bits.end_s, pages=bits.pages.astype("<i4").tobytes(),
        touched=np.packbits(bits.touched, bitorder="little").tobytes(),
    )  # fmt: skip


def samples_frames(time_s: float, samples: Samples) -> bytes:
    """The frames of a SAMPLE array: none for no samples, several where they are too many for one."""
    rows = (MAX_FRAME_BYTES - 1024) // SAMPLE.itemsize
    parts = (samples[first : first + rows] for first in range(0, len(samples), rows))
    return b"".join(frame("samples", time_s, data=part.tobytes()) for part in parts)


def read_frames(file: BinaryIO, size: int, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset, fields with `kind` and `time_s`) of each frame of a file of `size` bytes that stands behind MAGIC.

    Each has the fields of its kind, of their types. Adds to `notes` a frame that the file's end cuts short, and how
    many of unknown kinds were passed over. Raises RecordingError for damage.
    """
    at, unknown = file.tell(), 0
    while at < size:
        header = file.read(_LENGTH.size)
        length = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else 0
        if len(header) == _LENGTH.size and not 0 < length <= MAX_FRAME_BYTES:
            raise RecordingError(f"the frame at byte {at} claims {length} bytes, not 1 to {MAX_FRAME_BYTES}")
        body = file.read(length) if at + _LENGTH.size + length <= size else b""
        if len(header) < _LENGTH.size or len(body) < length:
            notes.append(f"the last frame is cut short: {size - at} bytes from byte {at} on are not read")
            break
        try:
            fields = _decode(body)
        except ValueError as error:
            raise RecordingError(f"the frame at byte {at} is damaged: {error}") from None
        if fields["kind"] in FIELDS:
            yield at, fields
        else:
            unknown += 1
        at += _LENGTH.size + length
    if unknown:
        notes.append(f"{unknown} frames of kinds that this version does not know are passed over")


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"it has msgpack extension {code}")


def _decode(body: bytes) -> dict[str, Any]:
    """The map of a frame's body. Raises ValueError saying what is wrong with it."""
    try:
        if len(body) > MAX_PLAIN_BYTES:
            _check_plain(body)
        fields = msgpack.unpackb(
            body, raw=False, use_list=True, strict_map_key=True, ext_hook=_refuse_extension, max_map_len=1 << 16,
            unicode_errors="surrogateescape",
        )  # fmt: skip
    except (msgpack.UnpackException, RecursionError) as error:
        raise ValueError(str(error)[:200] or type(error).__name__) from None
    if type(fields) is not dict or type(fields.get("kind")) is not str or not _fits(fields.get("time_s"), "time"):
        raise ValueError("it is no map with a kind and a time")
    for name, type_name in FIELDS.get(fields["kind"], {}).items():
        if not _fits(fields.setdefault(name, None), type_name):
            raise ValueError(f"{fields['kind']}.{name} is {fields[name]!r:.80}, not of type {type_name!r}")
    return fields


def _check_plain(body: bytes) -> None:
    """Raises ValueError if anything but byte strings takes more than MAX_PLAIN_BYTES, without making objects of it."""
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_FRAME_BYTES)
    unpacker.feed(body)
    plain = len(body)
    for _ in range(2 * min(unpacker.read_map_header(), _MAX_FIELDS)):
        begin = unpacker.tell()
        unpacker.skip()
        if body[begin] in _BYTES_CODES:
            plain -= unpacker.tell() - begin
    if plain > MAX_PLAIN_BYTES:
        raise ValueError(f"{plain} of its bytes are no byte strings; {MAX_PLAIN_BYTES} may be")
