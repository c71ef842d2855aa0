"""Fill: a part of a tensor that a source is to bring. Pure; each kind of source takes the fields that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tiermem import _native


class Fill(NamedTuple):
    """`length` bytes of tensor number `tensor`: in its file at `file_offset`, in memory at `address`, which is `offset`
    of segment number `segment`."""

    file_offset: int
    length: int
    address: int
    tensor: int
    segment: int
    offset: int


class Source(Protocol):
    """Where the bytes of one load come from. Several threads read at once."""

    @property
    def reads_at_once(self) -> int | None:
        """How many tasks of a load may be under way, in order; None: as many as there are threads."""

    @property
    def whole_segments(self) -> bool:
        """Whether the memory of a segment must all be there before the first read into it."""

    def read(self, file: int, fills: Sequence[Fill], staging: _native.Staging) -> None:
        """Bring these parts, all of file number `file`. Raises ReadError, CheckpointChanged."""

    def disbelieve(self, tensor: int) -> bool:
        """What came of the tensor has another digest: whether it may be had by reading it again."""

    def check(self) -> None:
        """Raise CheckpointChanged where it is no longer what the manifest describes."""

    def close(self) -> None:
        """Give back whatever was opened."""
