"""PyTorch checkpoints (`torch.save` since 1.6): one file's archive -> its facts and raw tensors. Imports no torch.

Reads the pickle that names the tensors, as data (`torch_pickle`), and no storage. Nested dicts and lists become names
joined with dots; plain values in them become the file's metadata. Several tensors may share bytes: each is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tiermem.checkpoint.cursor import Cursor, Span, Unusable, open_header
from tiermem.checkpoint.layout import RawTensor
from tiermem.checkpoint.sizes import nbytes_of
from tiermem.checkpoint.strict_json import shown
from tiermem.checkpoint.torch_pickle import StoredTensor, unpickle
from tiermem.checkpoint.torch_zip import MAGIC, members
from tiermem.types import DTYPE_BITS, CheckpointFile

_MAX_PICKLE_BYTES = 32 << 20
_MAX_DEPTH = 32
_MAX_ENTRIES = 1 << 17
_MAX_NAME_LENGTH = 512
_MAX_TEXT = 1024
_PICKLE = "data.pkl"
_OLD_PICKLE = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The number that torch.save wrote first, before version 1.6."""
_TAR_AT, _TAR = 257, b"ustar"


def read_torch(path: str, number: int) -> tuple[CheckpointFile, list[RawTensor]]:
    """Facts and tensors, ordered by offset, of the file that torch.save wrote to `path`, file `number` of a checkpoint.

    Raises CheckpointError (malformed; of the format before torch 1.6; holds anything but tensors and plain values; a
    tensor that is not contiguous), CheckpointNotFound, CheckpointChanged, AccessDenied, ReadError.
    """
    with open_header(path) as (cursor, facts):
        _refuse_old(cursor)
        archive = members(cursor)
        root = _root(archive)
        _check_byte_order(cursor, archive.get(root + "byteorder"))
        pickle = archive[root + _PICKLE]
        if pickle.length > _MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle has {pickle.length} bytes, more than the {_MAX_PICKLE_BYTES} of any sane one")
        cursor.at = pickle.start
        stored, metadata = _flattened(unpickle(cursor.take(pickle.length)))
        tensors = [_raw(name, tensor, archive, root, number) for name, tensor in stored.items()]
        tensors.sort(key=lambda tensor: (tensor.file_offset, tensor.nbytes))
        return CheckpointFile(path, *facts, cursor.digest, metadata or None), tensors


def _refuse_old(cursor: Cursor) -> None:
    start = cursor.peek(512)
    if start.startswith(_OLD_PICKLE) or start[_TAR_AT:].startswith(_TAR):
        raise Unusable(
            "is of the format before torch 1.6; convert it: "
            "python -c 'import sys, torch; p = sys.argv[1]; torch.save(torch.load(p, weights_only=True), p)' FILE"
        )
    if not start.startswith(MAGIC):
        raise ValueError("does not begin as a zip archive, so torch.save did not write it")


def _root(archive: Mapping[str, Span]) -> str:
    """The folder that holds everything, with its slash."""
    roots = [name.removesuffix(_PICKLE) for name in archive if name.count("/") == 1 and name.endswith("/" + _PICKLE)]
    if len(roots) != 1:
        raise ValueError(f"its archive has {len(roots)} members FOLDER/{_PICKLE}, and not one")
    return roots[0]


def _check_byte_order(cursor: Cursor, member: Span | None) -> None:
    # Absent before torch 2.1, when big-endian machines were not told apart; those were rare.
    if member is None:
        return
    cursor.at = member.start
    order = cursor.take(min(member.length, 16))
    if order != b"little":
        raise Unusable(f"its tensors are in the byte order {shown(order)}; save it on a little-endian machine")


def _flattened(root: object) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors, and plain values as text, by their dotted names."""
    if not isinstance(root, dict):
        raise Unusable(f"holds a {type(root).__name__}, not a dict of tensors; save the model's state_dict")
    tensors: dict[str, StoredTensor] = {}
    values: dict[str, str] = {}
    pending: list[tuple[str, object, int]] = [(str(key), value, 1) for key, value in root.items()]
    count = 0
    while pending:
        name, value, depth = pending.pop()
        count += 1
        if count > _MAX_ENTRIES or depth > _MAX_DEPTH or len(name) > _MAX_NAME_LENGTH:
            raise ValueError(f"{shown(name)} is one entry too many, too deep, or has too long a name")
        if name.encode(errors="replace") != name.encode(errors="surrogatepass"):
            raise ValueError(f"the name {shown(name)} is no UTF-8")
        if name in tensors or name in values:
            raise Unusable(f"two entries have the name {shown(name)}; save the model's state_dict alone")
        if isinstance(value, StoredTensor):
            tensors[name] = value
        elif isinstance(value, dict | list | tuple):
            entries: Iterable[tuple[object, object]] = value.items() if isinstance(value, dict) else enumerate(value)
            if count + len(pending) + len(value) > _MAX_ENTRIES:
                raise ValueError(f"{shown(name)} has {len(value)} entries, too many with those before")
            pending += [(f"{name}.{key}", entry, depth + 1) for key, entry in entries]
        elif value is None or isinstance(value, bool | int | float | str):
            values[name] = str(value)[:_MAX_TEXT].encode(errors="replace").decode()
        else:
            raise ValueError(f"{shown(name)} is a {type(value).__name__}, and no tensor")
    return tensors, values


def _raw(name: str, tensor: StoredTensor, archive: Mapping[str, Span], root: str, number: int) -> RawTensor:
    storage = tensor.storage
    member = archive.get(f"{root}data/{storage.key}")
    if member is None:
        raise ValueError(f"tensor {shown(name)} is in storage {shown(storage.key)}, which the archive lacks")
    nbytes = nbytes_of(name, tensor.dtype, tensor.shape)
    if not _is_contiguous(tensor):
        raise Unusable(
            f"tensor {shown(name)} of shape {shown(tensor.shape)} has strides {shown(tensor.strides)} and so is not "
            "contiguous; save tensor.contiguous()"
        )
    item = DTYPE_BITS[tensor.dtype] // 8
    held = storage.elements * (1 if storage.dtype is None else DTYPE_BITS[storage.dtype] // 8)
    if held > member.length or not 0 <= tensor.offset * item <= held - nbytes:
        raise ValueError(
            f"tensor {shown(name)} has {nbytes} bytes from byte {tensor.offset * item}, but storage "
            f"{shown(storage.key)} claims {held} bytes and has {member.length}"
        )
    return RawTensor(name, tensor.dtype, tensor.shape, number, member.start + tensor.offset * item, nbytes)


def _is_contiguous(tensor: StoredTensor) -> bool:
    """Whether elements follow each other in the order of their indexes; a dimension of 1 has no stride."""
    if len(tensor.shape) != len(tensor.strides):
        return False
    stride = 1
    for size, given in zip(tensor.shape[::-1], tensor.strides[::-1], strict=True):
        if size != 1 and given != stride:
            return 0 in tensor.shape
        stride *= size
    return True
