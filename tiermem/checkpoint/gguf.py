"""The GGUF format, version 2 and 3: one file's header -> its facts and raw tensors. Reads no tensor bytes.

After ggml's `docs/gguf.md`, and as strict as its reader (`gguf_init_from_file`): no nested arrays, and every tensor
follows the one before it at the next multiple of the alignment. Types and block sizes are those of `gguf.constants`
0.19. A quantised tensor is served as U8, its rows in bytes; the file's metadata says what it is:
`tiermem.ggml.NAME` -> `Q4_1 [49152, 576]`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

from tiermem.checkpoint.cursor import Cursor, Unusable, open_header
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.sizes import bits_of, nbytes_of
from tiermem.checkpoint.strict_json import shown
from tiermem.errors import CheckpointNotFound
from tiermem.types import CheckpointFile

MAGIC = b"GGUF"

_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_COUNT = 1 << 17
"""Tensors of a file, or keys; the largest models have some thousand."""
_MAX_NAME_BYTES = 1024
_MAX_DIMENSIONS = 4
_MAX_TEXT_BYTES = 1 << 16
_MAX_LISTED = 16
_STRINGS_BYTES = 1 << 18

_SCALARS = ("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?", None, None, "<Q", "<q", "<d")
"""struct's format of each type of a value; STRING and ARRAY have none."""
_STRING, _ARRAY = 8, 9

_DTYPES = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
_BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""Number of a quantised type -> its name, the elements of a block, the bytes of a block."""

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class _Info(NamedTuple):
    """A tensor as the header describes it; `offset` counts from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    true_type: str | None


def split_paths(path: str) -> list[str]:
    """All files of the split checkpoint that the file `path` belongs to, in order; of no split, `path` alone.

    Raises CheckpointNotFound where one is missing.
    """
    match = _SPLIT.fullmatch(os.path.basename(path))
    if match is None:
        return [path]
    count = int(match["count"])
    folder = os.path.dirname(path)
    paths = []
    for i in range(1, count + 1):
        paths.append(os.path.join(folder, f"{match['stem']}-{i:05}-of-{count:05}.gguf"))
        if not os.path.exists(paths[-1]):
            raise CheckpointNotFound(f"{path}: file {i} of {count}, {paths[-1]}, is missing; download it")
    return paths


def read_gguf(path: str, number: int) -> tuple[CheckpointFile, list[RawTensor]]:
    """Facts and tensors, ordered by offset, of the GGUF file at `path`, which is file `number` of a checkpoint.

    Raises CheckpointError (malformed, big-endian, of version 1), CheckpointNotFound, CheckpointChanged, AccessDenied,
    ReadError.
    """
    with open_header(path) as (cursor, facts):
        _check_version(cursor)
        tensor_count = _count(cursor, "tensors")
        metadata, alignment = _metadata(cursor, _count(cursor, "keys"))
        _check_split(path, metadata)
        infos = [_info(cursor) for _ in range(tensor_count)]
        if len({info.name for info in infos}) != tensor_count:
            raise ValueError("two tensors have the same name")
        tensors = _placed(infos, alignment, number, _aligned(cursor.at, alignment), facts.size)
        # Last, so that no key of the file's own stands in for these.
        metadata |= {f"tiermem.ggml.{info.name}": info.true_type for info in infos if info.true_type is not None}
        return CheckpointFile(path, *facts, cursor.digest, metadata), tensors


def _check_version(cursor: Cursor) -> None:
    if cursor.peek(4) != MAGIC:
        raise ValueError("does not begin with GGUF, so this is no GGUF file")
    cursor.skip(4)
    version = cursor.unsigned(4)
    if version & 0xFFFF == 0 and version:
        raise Unusable("is a big-endian GGUF file; convert it with gguf_convert_endian, or take a little-endian one")
    if version not in (2, 3):
        raise Unusable(f"is GGUF of version {version}, read are 2 and 3; convert it with a current llama.cpp")


def _count(cursor: Cursor, what: str) -> int:
    count = cursor.unsigned(8)
    if count > _MAX_COUNT:
        raise ValueError(f"the header claims {count} {what}, more than the {_MAX_COUNT} of any sane file")
    return count


def _text(cursor: Cursor, what: str) -> str:
    length = cursor.unsigned(8)
    if length > _MAX_NAME_BYTES:
        raise ValueError(f"byte {cursor.at}: the name of a {what} has {length} bytes, more than {_MAX_NAME_BYTES}")
    return cursor.take(length).decode()


def _metadata(cursor: Cursor, count: int) -> tuple[dict[str, str], int]:
    """Every key with its value as text, and the alignment. Long strings and arrays are described instead."""
    metadata: dict[str, str] = {}
    alignment = _DEFAULT_ALIGNMENT
    for _ in range(count):
        key = _text(cursor, "key")
        if key in metadata:
            raise ValueError(f"key {shown(key)} occurs twice")
        kind = cursor.unsigned(4)
        if key == _ALIGNMENT:
            if kind != _SCALARS.index("<I"):
                raise ValueError(f"{_ALIGNMENT} has type {kind}, and is no 32-bit number")
            alignment = int.from_bytes(cursor.peek(4), "little")
            if alignment == 0 or alignment & (alignment - 1):
                raise ValueError(f"{_ALIGNMENT} is {alignment}, and no power of two")
        metadata[key] = _value(cursor, key, kind)
    return metadata, alignment


def _value(cursor: Cursor, key: str, kind: int) -> str:
    if kind == _STRING:
        length = cursor.unsigned(8)
        if length > _MAX_TEXT_BYTES:
            cursor.skip(length)
            return f"<string of {length} bytes>"
        return cursor.take(length).decode(errors="replace")
    if kind == _ARRAY:
        return _array(cursor, key, cursor.unsigned(4), cursor.unsigned(8))
    return _scalar(cursor, _scalar_format(key, kind))


def _scalar_format(key: str, kind: int) -> str:
    layout = _SCALARS[kind] if kind < len(_SCALARS) else None
    if layout is None:
        raise ValueError(f"key {shown(key)} has a value of type {kind}, which is unknown, or may not be here")
    return layout


def _scalar(cursor: Cursor, layout: str) -> str:
    (value,) = struct.unpack(layout, cursor.take(struct.calcsize(layout)))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _array(cursor: Cursor, key: str, kind: int, count: int) -> str:
    if kind == _STRING:
        _skip_strings(cursor, count)
        return f"<{count} strings>"
    layout = _scalar_format(key, kind)
    if count <= _MAX_LISTED:
        return f"[{', '.join(_scalar(cursor, layout) for _ in range(count))}]"
    cursor.skip(count * struct.calcsize(layout))
    return f"<{count} numbers>"


def _skip_strings(cursor: Cursor, count: int) -> None:
    """Pass `count` strings: a vocabulary has hundreds of thousands, so many are passed with each read."""
    length_of = struct.Struct("<Q").unpack_from
    while count:
        chunk = cursor.peek(_STRINGS_BYTES)
        at, last = 0, len(chunk) - 8
        if last < 0:
            raise ValueError(f"byte {cursor.at}: {count} more strings should follow, but the file ends")
        while count and at <= last:
            at += 8 + length_of(chunk, at)[0]
            count -= 1
        cursor.skip(at)


def _check_split(path: str, metadata: Mapping[str, str]) -> None:
    match = _SPLIT.fullmatch(os.path.basename(path))
    count = metadata.get("split.count")
    if count is None or (match is None and count in ("0", "1")):
        return
    if match is None:
        raise Unusable(f"is one of {count} files of a split checkpoint; keep the names NAME-00001-of-{count:0>5}.gguf")
    here, said = f"{int(match['number']) - 1} of {int(match['count'])}", f"{metadata.get('split.no')} of {count}"
    if here != said:
        raise ValueError(f"by its name the file is part {here}, counted from 0, but by its header part {said}")


def _info(cursor: Cursor) -> _Info:
    name = _text(cursor, "tensor")
    count = cursor.unsigned(4)
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {shown(name)} has {count} dimensions, more than {_MAX_DIMENSIONS}")
    # The first dimension is the one whose elements are neighbours; numpy's last.
    shape = tuple(cursor.unsigned(8) for _ in range(count))[::-1]
    kind, offset = cursor.unsigned(4), cursor.unsigned(8)
    if kind in _DTYPES:
        return _Info(name, _DTYPES[kind], shape, nbytes_of(name, _DTYPES[kind], shape), offset, None)
    if kind not in _BLOCKS:
        raise Unusable(f"tensor {shown(name)} has the unknown type {kind}; convert the file with a current llama.cpp")
    true_type, elements, nbytes = _BLOCKS[kind]
    bits_of(name, 8 * nbytes, shape)
    if not shape or shape[-1] % elements:
        raise ValueError(f"tensor {shown(name)} of type {true_type} has shape {shown(shape)}: no whole blocks a row")
    rows = (*shape[:-1], shape[-1] // elements * nbytes)
    return _Info(name, "U8", rows, nbytes_of(name, "U8", rows), offset, f"{true_type} {list(shape)}")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _placed(infos: list[_Info], alignment: int, number: int, data_start: int, file_size: int) -> list[RawTensor]:
    end = 0
    tensors = []
    for info in infos:
        if info.offset != _aligned(end, alignment):
            raise ValueError(
                f"tensor {shown(info.name)} begins at {info.offset}, but the tensor before it ends at {end} and the "
                f"alignment is {alignment}"
            )
        end = info.offset + info.nbytes
        if data_start + end > file_size:
            raise ValueError(
                f"tensor {shown(info.name)} ends at byte {data_start + end}, but the file has {file_size} bytes: "
                f"truncated by {data_start + end - file_size} bytes"
            )
        tensors.append(RawTensor(info.name, info.dtype, info.shape, number, data_start + info.offset, info.nbytes))
    return tensors
