"""Fields: a cursor over little-endian numbers and texts that never leaves its bytes. Knows no record."""

from __future__ import annotations

import os
import struct

from tiermem.errors import RecordingError

Bytes = bytes | bytearray | memoryview

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def text_of(data: Bytes) -> str:
    """The text before the first null character, as the file system would spell it."""
    return os.fsdecode(bytes(data).split(b"\0", 1)[0])


class Fields:
    """What is left of `data`; `what` names it in the RecordingError that an overrun raises."""

    __slots__ = ("_at", "_data", "_what")

    def __init__(self, data: Bytes, what: str) -> None:
        self._data = memoryview(data)
        self._at = 0
        self._what = what

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, nbytes: int) -> memoryview:
        if nbytes > self.left:
            raise RecordingError(f"{self._what} claims {nbytes} bytes at {self._at}, and {self.left} are left")
        self._at += nbytes
        return self._data[self._at - nbytes : self._at]

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def numbers(self, count: int) -> tuple[int, ...]:
        """`count` u64."""
        return struct.unpack(f"<{count}Q", self.take(8 * count))

    def text(self) -> str:
        """A perf_header_string: u32 length, then that many bytes with the text and at least one null character."""
        return text_of(self.take(self.u32()))
