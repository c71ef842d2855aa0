"""Bad checkpoints, each written by one function, and the error that each must end in. Asserts nothing itself.

`CORPUS` maps a name to (builder, error class, words of the message). A builder writes into the empty directory that
it gets and returns the path to open.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tiermem.errors import CheckpointError, CheckpointNotFound, ReadError, TiermemError

Builder = Callable[[Path], Path]


class Case(NamedTuple):
    """A builder, exactly the class that opening its path raises, and words that the message has."""

    build: Builder
    error: type[TiermemError]
    words: str


def entry(dtype: str, shape: list[object], begin: object, end: object) -> dict[str, object]:
    """A tensor's entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def header_text(tensors: Mapping[str, object]) -> bytes:
    """A header as safetensors would write it, without padding."""
    return json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()


def write_file(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file of `header` and `data` that claims a header of `length` bytes (default: the truth)."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return path


def write_good(path: Path, *names: str) -> Path:
    """A well-formed file with one F32 tensor of shape [2] for each name."""
    tensors = {name: entry("F32", [2], 8 * i, 8 * i + 8) for i, name in enumerate(names)}
    return write_file(path, header_text(tensors), bytes(8 * len(names)))


def write_index(directory: Path, weight_map: object, text: bytes | None = None) -> Path:
    """`model.safetensors.index.json` in `directory`; returns the directory."""
    body = json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}).encode() if text is None else text
    (directory / "model.safetensors.index.json").write_bytes(body)
    return directory


def _raw(content: bytes) -> Builder:
    def build(directory: Path) -> Path:
        path = directory / "bad.safetensors"
        path.write_bytes(content)
        return path

    return build


def _text(header: bytes, data: bytes = b"", length: int | None = None) -> Builder:
    return lambda directory: write_file(directory / "bad.safetensors", header, data, length)


def _tensors(data_bytes: int, **tensors: object) -> Builder:
    return _text(header_text(tensors), bytes(data_bytes))


def _tensor(dtype: str, shape: list[object], begin: object, end: object, data_bytes: int = 8) -> Builder:
    return _tensors(data_bytes, a=entry(dtype, shape, begin, end))


def _index(weight_map: object) -> Builder:
    def build(directory: Path) -> Path:
        write_good(directory / "one.safetensors", "a")
        return write_index(directory, weight_map)

    return build


def _index_text(text: bytes) -> Builder:
    return lambda directory: write_index(directory, None, text)


def _index_through_linked_folder(directory: Path) -> Path:
    outside = directory / "outside"
    inside = directory / "model"
    outside.mkdir()
    inside.mkdir()
    write_good(outside / "one.safetensors", "a")
    (inside / "link").symlink_to(outside)
    return write_index(inside, {"a": "link/one.safetensors"})


def _huge_index(directory: Path) -> Path:
    write_index(directory, {})
    os.truncate(directory / "model.safetensors.index.json", 100_000_001)
    return directory


def _two_indexes(directory: Path) -> Path:
    for stem in ("a", "b"):
        (directory / f"{stem}.safetensors.index.json").write_text("{}")
    return directory


def _same_name_twice(directory: Path) -> Path:
    write_good(directory / "one.safetensors", "a", "b")
    write_good(directory / "two.safetensors", "b", "c")
    return directory


def _same_name_twice_indexed(directory: Path) -> Path:
    return write_index(_same_name_twice(directory), {"a": "one.safetensors", "c": "two.safetensors"})


def _fifo(directory: Path) -> Path:
    os.mkfifo(directory / "bad.safetensors")
    return directory / "bad.safetensors"


def _fifo_shard(directory: Path) -> Path:
    os.mkfifo(directory / "one.safetensors")
    return write_index(directory, {"a": "one.safetensors"})


def _directory_as_shard(directory: Path) -> Path:
    (directory / "one.safetensors").mkdir()
    return directory


def _no_weights(directory: Path) -> Path:
    (directory / "config.json").write_text("{}")
    (directory / ".hidden.safetensors").write_text("")
    return directory


def _link_to_itself(directory: Path) -> Path:
    (directory / "bad.safetensors").symlink_to("bad.safetensors")
    return directory / "bad.safetensors"


def _sparse_header(directory: Path) -> Path:
    path = write_file(directory / "bad.safetensors", b"", length=100_000_000)
    os.truncate(path, 100_000_008)
    return path


def _archive_start(directory: Path) -> Path:
    path = directory / "pytorch_model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    return path


_GOOD = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
_OPEN = b'{"a":{"dtype":"F32","shape":'


def _bad(build: Builder, words: str) -> Case:
    return Case(build, CheckpointError, words)


CORPUS: dict[str, Case] = {
    # The frame: length, header, end of file.
    "empty file": _bad(_raw(b""), "the file has 0 bytes"),
    "seven bytes": _bad(_raw(bytes(7)), "the file has 7 bytes"),
    "header length zero": _bad(_raw(bytes(8)), "does not begin with '{'"),
    "header length 2^63": _bad(_text(_GOOD, bytes(8), 1 << 63), "9223372036854775808 bytes"),
    "header length 2^64-1": _bad(_text(_GOOD, bytes(8), (1 << 64) - 1), "18446744073709551615 bytes"),
    "header length over the limit": _bad(_text(_GOOD, bytes(8), 100_000_001), "more than the 100000000"),
    "header truncated": _bad(_text(_GOOD[:30], length=len(_GOOD)), "but the file has 38"),
    "header cut by its length": _bad(_text(_GOOD, bytes(8), 20), "not JSON"),
    "header of 100 MB of zeros": _bad(_sparse_header, "does not begin with '{'"),
    "file shorter than its header says": _bad(_text(_GOOD, bytes(5)), "truncated by 3 bytes"),
    "no data at all": _bad(_text(_GOOD), "truncated by 8 bytes"),
    "trailing garbage": _bad(_text(_GOOD, bytes(11)), "followed by 3 bytes"),
    "data but no tensors": _bad(_text(b"{}", bytes(3)), "followed by 3 bytes"),
    # The JSON.
    "not JSON": _bad(_text(b"{not json}"), "not JSON"),
    "leading space": _bad(_text(b" " + _GOOD, bytes(8)), "does not begin with '{'"),
    "byte order mark": _bad(_text(b"\xef\xbb\xbf" + _GOOD, bytes(8)), "does not begin with '{'"),
    "a list": _bad(_text(b"[]"), "does not begin with '{'"),
    "two objects": _bad(_text(_GOOD + b"{}", bytes(8)), "Extra data"),
    "padded with NUL": _bad(_text(_GOOD + b"\0\0", bytes(8)), "Extra data"),
    "not UTF-8": _bad(_text(_GOOD.replace(b'"a"', b'"\xff"'), bytes(8)), "not UTF-8"),
    "lone surrogate as name": _bad(_text(_GOOD.replace(b'"a"', b'"\\ud800"'), bytes(8)), "not UTF-8"),
    "lone surrogate in metadata": _bad(_text(b'{"__metadata__":{"a":"\\udc00"}}'), "not UTF-8"),
    "control character in a name": _bad(_text(_GOOD.replace(b'"a"', b'"\n"'), bytes(8)), "not JSON"),
    "tensor twice": _bad(_text(_GOOD[:-1] + b"," + _GOOD[1:], bytes(8)), "key 'a' occurs twice"),
    "tensor twice by an escape": _bad(
        _text(_GOOD[:-1] + b"," + _GOOD[1:].replace(b'"a"', b'"\\u0061"'), bytes(8)), "key 'a' occurs twice"
    ),
    "dtype twice": _bad(_text(_GOOD.replace(b'"shape"', b'"dtype":"F32","shape"'), bytes(8)), "'dtype' occurs twice"),
    "metadata twice": _bad(_text(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' occurs twice"),
    "nested lists": _bad(_text(_OPEN + b"[" * 100_000), "nested too deeply"),
    "nested objects": _bad(_text(b'{"a":' * 100_000), "nested too deeply"),
    "shape nested 200 deep": _bad(_text(_OPEN + b"[" * 200 + b"]" * 200 + b',"data_offsets":[0,4]}}'), "dimension"),
    "NaN": _bad(_text(_OPEN + b'[NaN],"data_offsets":[0,8]}}', bytes(8)), "NaN is not JSON"),
    "Infinity": _bad(_text(_OPEN + b'[2],"data_offsets":[0,Infinity]}}', bytes(8)), "Infinity is not JSON"),
    "integer of 100,000 digits": _bad(
        _text(_OPEN + b"[" + b"9" * 100_000 + b'],"data_offsets":[0,8]}}', bytes(8)), "tensor 'a' has shape [inf]"
    ),
    "name of a megabyte": _bad(_tensors(8, **{"n" * 1_000_000: entry("F99", [2], 0, 8)}), "unknown dtype 'F99'"),
    # The entries.
    "metadata of numbers": _bad(_tensors(0, __metadata__={"a": 1}), "__metadata__ must map strings to strings"),
    "metadata a list": _bad(_tensors(0, __metadata__=[]), "__metadata__ must map strings to strings"),
    "entry a list": _bad(_tensors(8, a=["F32", [2], [0, 8]]), "tensor 'a' must have dtype"),
    "entry without shape": _bad(_tensors(8, a={"dtype": "F32", "data_offsets": [0, 8]}), "tensor 'a' must have dtype"),
    "entry with another key": _bad(_tensors(8, a=entry("F32", [2], 0, 8) | {"strides": [4]}), "tensor 'a' must have"),
    "unknown dtype": _bad(_tensor("F128", [2], 0, 8), "tensor 'a' has unknown dtype 'F128'"),
    "dtype a list": _bad(_tensors(8, a={"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}), "unknown dtype"),
    "shape a number": _bad(_tensors(8, a={"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}), "must have lists"),
    "shape negative": _bad(_tensor("F32", [-2], 0, 8), "shape [-2.0]"),
    "shape minus zero": _bad(_text(_OPEN + b'[-0],"data_offsets":[0,0]}}'), "shape [-0.0]"),
    "shape a float": _bad(_tensor("F32", [2.0], 0, 8), "shape [2.0]"),
    "shape a bool": _bad(_tensor("F32", [True], 0, 4, 4), "shape [True]"),
    "shape a string": _bad(_tensor("F32", ["2"], 0, 8), "shape ['2']"),
    "shape overflows": _bad(_tensor("F32", [1 << 32, 1 << 32], 0, 8), "overflows"),
    "shape overflows to the right size": _bad(_tensor("U8", [(1 << 64) - 1, 1 << 60, 8], 0, 8), "overflows"),
    "shape overflows before a zero": _bad(_tensor("U8", [1 << 40, 1 << 40, 0], 0, 0, 0), "overflows"),
    "shape overflows behind a zero": _bad(_tensor("U8", [0, 1 << 40, 1 << 40], 0, 0, 0), "overflows"),
    "shape of 100,000 dimensions": _bad(_tensor("U8", [(1 << 64) - 1] * 100_000, 0, 8), "overflows"),
    "size too small": _bad(_tensor("F32", [2], 0, 4, 4), "takes 8 bytes, but its data_offsets [0, 4] hold 4"),
    "size too large": _bad(_tensor("F16", [2], 0, 8), "takes 4 bytes, but its data_offsets [0, 8] hold 8"),
    "F4 ends within a byte": _bad(_tensor("F4", [3], 0, 2, 2), "ends within a byte"),
    "F6 ends within a byte": _bad(_tensor("F6_E2M3", [2], 0, 2, 2), "ends within a byte"),
    "offsets negative": _bad(_tensor("F32", [2], -8, 0), "data_offsets [-8.0, 0]"),
    "offsets reversed": _bad(_tensor("F32", [2], 8, 0), "data_offsets [8, 0]"),
    "offsets bools": _bad(_tensor("U8", [1], False, True, 1), "data_offsets [False, True]"),
    "one offset": _bad(_tensors(8, a={"dtype": "F32", "shape": [2], "data_offsets": [8]}), "data_offsets [8]"),
    "three offsets": _bad(_tensors(8, a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}), "[0, 8, 9]"),
    "offsets out of range": _bad(_tensor("F32", [2], 1 << 62, (1 << 62) + 8), "a hole of 4611686018427387904 bytes"),
    "hole before the first": _bad(_tensor("F32", [1], 4, 8), "tensor 'a' begins at 4"),
    "hole between": _bad(_tensors(12, a=entry("F32", [1], 0, 4), b=entry("F32", [1], 8, 12)), "tensor 'b' begins at 8"),
    "overlap": _bad(_tensors(12, a=entry("F32", [2], 0, 8), b=entry("F32", [2], 4, 12)), "an overlap of 4 bytes"),
    "same bytes twice": _bad(_tensors(8, a=entry("F32", [2], 0, 8), b=entry("F32", [2], 0, 8)), "overlap of 8 bytes"),
    "empty tensor inside another": _bad(
        _tensors(8, a=entry("F32", [2], 0, 8), b=entry("F32", [0], 4, 4)), "an overlap of 4 bytes"
    ),
    # Several files.
    "index not JSON": _bad(_index_text(b"<html>"), "not JSON"),
    "index a list": _bad(_index_text(b"[]"), "not a JSON object but a list"),
    "index without a map": _bad(_index_text(b"{}"), "weight_map must map"),
    "index with an empty map": _bad(_index({}), "weight_map must map"),
    "index with a list as map": _bad(_index(["one.safetensors"]), "weight_map must map"),
    "index with a number as file": _bad(_index({"a": 1}), "tensor 'a' must be in a file"),
    "index names a tensor twice": _bad(
        _index_text(b'{"weight_map":{"a":"one.safetensors","a":"two.safetensors"}}'), "key 'a' occurs twice"
    ),
    "index nested": _bad(_index_text(b"[" * 100_000), "nested too deeply"),
    "index of 100 MB": _bad(_huge_index, "has 100000001 bytes"),
    "index names a missing file": _bad(_index({"a": "one.safetensors", "b": "gone.safetensors"}), "which is missing"),
    "index escapes upwards": _bad(_index({"a": "../one.safetensors"}), "outside the checkpoint"),
    "index escapes and returns": _bad(_index({"a": "x/../one.safetensors"}), "outside the checkpoint"),
    "index names an absolute file": _bad(_index({"a": "/etc/passwd"}), "outside the checkpoint"),
    "index escapes by a linked folder": _bad(_index_through_linked_folder, "outside the checkpoint"),
    "index names a file with NUL": _bad(_index({"a": "one\0"}), "which is missing"),
    "index names a folder with NUL": _bad(_index({"a": "\0/one"}), "null byte"),
    "index names its directory": _bad(_index({"a": ""}), "is not a regular file"),
    "index names a tensor that its file lacks": _bad(
        _index({"a": "one.safetensors", "b": "one.safetensors"}), "tensor 'b' is in"
    ),
    "two indexes": _bad(_two_indexes, "holds 2 indexes"),
    "tensor in two shards": _bad(_same_name_twice, "tensor 'b' is in"),
    "tensor in two indexed shards": _bad(_same_name_twice_indexed, "tensor 'b' is in"),
    # The path.
    "FIFO": _bad(_fifo, "is not a regular file"),
    "FIFO as shard": _bad(_fifo_shard, "is not a regular file"),
    "directory as shard": _bad(_directory_as_shard, "is not a regular file"),
    "archive cut off": _bad(_archive_start, "is no whole zip archive"),
    "nothing there": Case(lambda directory: directory / "gone", CheckpointNotFound, "no such file"),
    "file as directory": Case(lambda d: write_good(d / "a.safetensors") / "b", CheckpointNotFound, "no such file"),
    "directory without weights": Case(_no_weights, CheckpointNotFound, "holds no *.safetensors file"),
    "link to itself": Case(_link_to_itself, ReadError, "cannot be read"),
}
