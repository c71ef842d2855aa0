"""Vocabulary: the values that every room passes to the next. Frozen data; never acts and never does I/O.

    page        2 MiB of a segment: the unit of tracking and migration (the kernel's own is an "OS page")
    segment     one shared-memory file: the bytes of one layer of a model
    extent      (segment, offset, length): where a tensor's bytes are
    manifest    the parsed description of a checkpoint; no bytes
    residency   which tier holds a page: a tier id >= 0, or LOADING
    image       weights in one engine's final layout, keyed by a fingerprint; no checkpoint holds them
    lease       a client's right to read a model in place

`docs/design.md` section 2 has the whole glossary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PAGE_BYTES = 2 << 20
"""Bytes of a page."""

TENSOR_ALIGN = 4096
"""Every tensor starts at a multiple of this within its segment."""

LOADING = -2
"""Residency of a page that is in no tier yet."""

TENSOR_CLASSES = ("other", "embedding", "attention", "mlp", "expert", "norm", "head")
"""What a tensor is for, as its name says."""

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits per element of every dtype of the safetensors format, by its name there."""


def pages_of(length: int) -> int:
    """Pages that `length` bytes occupy."""
    return -(-length // PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes are: `length` bytes at `offset` of the model's segment number `segment`."""

    segment: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a manifest. `file_offset` counts from the start of file number `file`, header included."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    file_offset: int
    extent: Extent

    @property
    def nbytes(self) -> int:
        return self.extent.length


@dataclass(frozen=True, slots=True)
class ImageTensor:
    """A tensor of an image that is to be made; `layer` None is derived from the name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """One file of a checkpoint and the facts by which a change of it is noticed."""

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    header_digest: str
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One segment of a model: the layer it holds and the bytes it needs (before rounding up to pages)."""

    layer: str
    length: int

    @property
    def pages(self) -> int:
        return pages_of(self.length)

    @property
    def page_bytes(self) -> int:
        """Bytes that the segment takes in a tier: whole pages."""
        return self.pages * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Manifest:
    """The parsed description of a checkpoint: names, dtypes, shapes, extents; no bytes.

    `tensors` are in checkpoint order: file by file, by offset within a file. `identity` is a hex digest of the
    files' identities (device, inode, size, mtime, header digest); equal identity means the same weights.
    """

    path: str
    identity: str
    files: tuple[CheckpointFile, ...]
    segments: tuple[SegmentInfo, ...]
    tensors: tuple[TensorInfo, ...]
    by_name: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {tensor.name: i for i, tensor in enumerate(self.tensors)})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def page_bytes(self) -> int:
        """Bytes that the whole model takes in a tier."""
        return sum(segment.page_bytes for segment in self.segments)
