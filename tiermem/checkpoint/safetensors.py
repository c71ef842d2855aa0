"""The safetensors format: one file's header -> its facts and raw tensors. Reads no tensor bytes and trusts no number.

The rules are those of the format's README and of its Rust reader (huggingface/safetensors 0.8, `tensor.rs`:
`read_metadata`, `Metadata::validate`), which this reader never undercuts: what it accepts, that one accepts. It is
stricter in that a header begins with `{`, keys are unique, a tensor has exactly the three keys of the format, and a
dimension of 0 excuses no overflow of the others.
"""

from __future__ import annotations

from blake3 import blake3

from tiermem.checkpoint.file import FileFacts, read_exactly, regular_file
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.sizes import nbytes_of
from tiermem.checkpoint.strict_json import parse_object, shown
from tiermem.errors import CheckpointError
from tiermem.types import DTYPE_BITS, CheckpointFile

LENGTH_BYTES = 8
"""A file starts with the header's length: an unsigned little-endian integer of this many bytes."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_KEYS = {"dtype", "shape", "data_offsets"}


def read_header(path: str, number: int) -> tuple[CheckpointFile, list[RawTensor]]:
    """Facts and tensors, ordered by offset, of the safetensors file at `path`, which is file `number` of a checkpoint.

    Raises CheckpointError (malformed), CheckpointNotFound, CheckpointChanged, AccessDenied, ReadError.
    """
    with regular_file(path) as (descriptor, facts):
        try:
            length = _header_length(read_exactly(path, descriptor, 0, min(LENGTH_BYTES, facts.size)), facts)
            raw = read_exactly(path, descriptor, 0, LENGTH_BYTES + length)
            if raw[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
                raise ValueError("the header does not begin with '{', so this is no safetensors file")
            header = parse_object(raw[LENGTH_BYTES:])
            metadata = _metadata(header.pop("__metadata__", None))
            tensors = _tensors(header, number, len(raw), facts.size)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; download the file or write it again") from error
    return CheckpointFile(path, *facts, blake3(raw).hexdigest(), metadata), tensors


def _header_length(prefix: bytes, facts: FileFacts) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise ValueError(f"the file has {facts.size} bytes, fewer than the {LENGTH_BYTES} of a header's length")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header claims {length} bytes, more than the {MAX_HEADER_BYTES} that the format allows")
    if LENGTH_BYTES + length > facts.size:
        raise ValueError(f"the header claims {length} bytes, but the file has {facts.size}")
    return length


def _metadata(value: object) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"__metadata__ must map strings to strings, but is {shown(value)}")
    return value


def _tensors(header: dict[str, object], number: int, data_start: int, file_size: int) -> list[RawTensor]:
    """Check that the tensors tile the file from `data_start` to its end, and list them by offset."""
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[:2])
    end = 0
    tensors = []
    for begin, stop, name, dtype, shape in entries:
        if begin != end:
            what = "a hole" if begin > end else "an overlap"
            raise ValueError(
                f"tensor {shown(name)} begins at {begin}, but the tensor before it ends at {end}: "
                f"{what} of {abs(begin - end)} bytes"
            )
        tensors.append(RawTensor(name, dtype, shape, number, data_start + begin, stop - begin))
        end = stop
    if data_start + end != file_size:
        what = "truncated by" if data_start + end > file_size else "followed by"
        last = f"tensor {shown(entries[-1][2])}" if entries else "the header"
        raise ValueError(
            f"{last} ends at byte {data_start + end}, but the file has {file_size} bytes: "
            f"{what} {abs(file_size - data_start - end)} bytes"
        )
    return tensors


def _entry(name: str, entry: object) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of one tensor; offsets in bytes from the end of the header."""
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise ValueError(f"tensor {shown(name)} must have dtype, shape and data_offsets alone, but is {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {shown(name)} has unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError(f"tensor {shown(name)} must have lists as shape and data_offsets")
    nbytes = nbytes_of(name, dtype, shape)
    # type() and not isinstance(): a bool is an int, but no offset.
    if len(offsets) != 2 or not (type(offsets[0]) is type(offsets[1]) is int and offsets[0] <= offsets[1]):
        raise ValueError(f"tensor {shown(name)} has data_offsets {shown(offsets)}, which are no begin <= end")
    begin, end = offsets
    if end - begin != nbytes:
        raise ValueError(
            f"tensor {shown(name)} of dtype {dtype} and shape {shown(shape)} takes {nbytes} bytes, "
            f"but its data_offsets {shown(offsets)} hold {end - begin}"
        )
    return begin, end, name, dtype, tuple(shape)
