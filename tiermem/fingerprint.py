"""Fingerprint of an image: every input that its bytes depend on, as named fields. Pure; knows no engine.

Equal fields mean the same image. They cross the wire as a mapping and lie as JSON in the image's manifest, so that a
mismatch can be told by field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import accumulate
from math import prod

from blake3 import blake3

from tiermem.checkpoint.layout import RawTensor, lay_out
from tiermem.errors import ProtocolError
from tiermem.types import DTYPE_BITS, CheckpointFile, ImageTensor, Manifest

_SCHEME = "image:"
_KEY = "tiermem.fingerprint"
_MAX_FIELDS = 64
_MAX_CHARACTERS = 4096
_MAX_RANK = 255
_MAX_LENGTH = 1 << 63


def identity_of(fingerprint: Mapping[str, str]) -> str:
    """BLAKE3 hex over the fields, whatever their order. Raises ProtocolError for what is no fingerprint."""
    return blake3(_canonical(fingerprint).encode()).hexdigest()


def manifest_of(
    fingerprint: Mapping[str, str], tensors: Iterable[ImageTensor], metadata: Mapping[str, str] | None = None
) -> Manifest:
    """The manifest of an image: one layer a segment, tensors in the order given, and no file behind them.

    Raises ProtocolError for a fingerprint without fields, no tensors, an unknown dtype, a name given twice.
    """
    identity = identity_of(fingerprint)
    listed = list(tensors)
    if not listed:
        raise ProtocolError("an image without tensors has no bytes to share; name its tensors")
    sizes = [_nbytes(tensor) for tensor in listed]
    offsets = list(accumulate(sizes, initial=0))
    raw = [
        RawTensor(tensor.name, tensor.dtype, tuple(tensor.shape), 0, offset, size)
        for tensor, offset, size in zip(listed, offsets, sizes, strict=False)
    ]
    layers = {tensor.name: tensor.layer for tensor in listed if tensor.layer is not None}
    segments, infos = lay_out(raw, layers)
    if len({tensor.name for tensor in listed}) != len(listed):
        raise ProtocolError("an image has a tensor name twice; give each tensor a name of its own")
    facts = {**(metadata or {}), _KEY: _canonical(fingerprint)}
    path = _SCHEME + identity[:16]
    file = CheckpointFile(path, 0, 0, offsets[-1], 0, identity, facts)
    return Manifest(path, identity, (file,), segments, infos)


def is_image(manifest: Manifest) -> bool:
    """Whether it is of an image: no file holds its bytes, and what leaves memory of it is gone."""
    return manifest.path.startswith(_SCHEME)


def fingerprint_of(manifest: Manifest) -> dict[str, str]:
    """The fields of an image's fingerprint; none for a checkpoint."""
    if not is_image(manifest):
        return {}
    fields: dict[str, str] = json.loads((manifest.files[0].metadata or {})[_KEY])
    return fields


def metadata_of(manifest: Manifest, files: Iterable[CheckpointFile]) -> dict[str, str]:
    """What the maker of an image, or the writer of these checkpoint files, noted beside the tensors."""
    facts = {key: value for file in files for key, value in (file.metadata or {}).items()}
    if is_image(manifest):
        facts.pop(_KEY, None)
    return facts


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Each field that differs, with both values."""
    return [
        f"{name} is {_shown(found, name)}, not {_shown(wanted, name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]


def _shown(fields: Mapping[str, str], name: str) -> str:
    return repr(fields[name]) if name in fields else "absent"


def _canonical(fingerprint: Mapping[str, str]) -> str:
    if not 0 < len(fingerprint) <= _MAX_FIELDS:
        raise ProtocolError(f"a fingerprint has 1 to {_MAX_FIELDS} fields, this one {len(fingerprint)}")
    for name, value in fingerprint.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise ProtocolError(f"fingerprint: {name!r} is {value!r}; names and values are text")
        if len(name) + len(value) > _MAX_CHARACTERS:
            raise ProtocolError(f"fingerprint: {name[:64]!r} has more than {_MAX_CHARACTERS} characters; digest it")
    return json.dumps(dict(fingerprint), sort_keys=True, ensure_ascii=True)


def _nbytes(tensor: ImageTensor) -> int:
    bits = DTYPE_BITS.get(tensor.dtype)
    if bits is None:
        raise ProtocolError(f"image tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
    shape = tensor.shape
    bounded = len(shape) <= _MAX_RANK and all(0 <= length < _MAX_LENGTH for length in shape)
    nbytes, rest = divmod(prod(shape) * bits, 8) if bounded else (_MAX_LENGTH, 0)
    if nbytes >= _MAX_LENGTH:
        raise ProtocolError(f"image tensor {tensor.name!r} has the shape {list(shape[:8])}, of {len(shape)} dimensions")
    if rest:
        raise ProtocolError(f"image tensor {tensor.name!r} of {tensor.dtype}{list(shape)} ends within a byte; pad it")
    return nbytes
