"""Cursor: reads a file's header piece by piece, within bounds. Knows no format, never maps the file, never reads ahead
by more than a window, and keeps no byte that its caller did not ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from blake3 import blake3

from tiermem.checkpoint.file import FileFacts, read_exactly, regular_file
from tiermem.errors import CheckpointError

_WINDOW_BYTES = 4096
"""Little, because between two descriptions of tensors there may be a tensor, which is not to be read."""

_MAX_BYTES = 256 << 20
_MAX_STEPS = 2_000_000
"""What one header may cost to read, whatever it says: some seconds."""


class Span(NamedTuple):
    """The bytes from `start` to `end` of a file."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


class Unusable(ValueError):
    """The file is of its format, but holds what is not read here; the message ends with what to do instead."""


class Cursor:
    """A place in a file of `size` bytes. Everything raises ValueError rather than pass the end of the file."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self.at = 0
        self._descriptor = descriptor
        self._window = b""
        self._window_at = 0
        self._bytes_left = _MAX_BYTES
        self._steps_left = _MAX_STEPS
        self._digest = blake3()

    @property
    def digest(self) -> str:
        """BLAKE3 hex over all that was read, in the order of reading: equal for equal headers."""
        return self._digest.hexdigest()

    def skip(self, length: int) -> int:
        """Pass `length` bytes without reading them; where they start."""
        if length > self.size - self.at:
            raise ValueError(f"byte {self.at}: {length} bytes should follow, but the file ends at {self.size}")
        start = self.at
        self.at += length
        return start

    def peek(self, most: int) -> bytes:
        """The next `most` bytes, fewer where the file ends, without passing them."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise ValueError(f"byte {self.at}: the header has more than {_MAX_STEPS} parts, more than any sane one")
        most = min(most, self.size - self.at)
        low = self.at - self._window_at
        if low < 0 or low + most > len(self._window):
            self._fill(most)
            low = 0
        return self._window[low : low + most]

    def take(self, length: int) -> bytes:
        """The next `length` bytes, of which the caller has bounded the number."""
        start = self.skip(length)
        self.at = start
        data = self.peek(length)
        self.at += length
        return data

    def unsigned(self, length: int) -> int:
        """The next `length` bytes as a little-endian number."""
        return int.from_bytes(self.take(length), "little")

    def _fill(self, least: int) -> None:
        length = min(max(least, _WINDOW_BYTES), self.size - self.at)
        self._bytes_left -= length
        if self._bytes_left < 0:
            raise ValueError(f"byte {self.at}: the header takes more than {_MAX_BYTES} bytes, more than any sane one")
        self._window = read_exactly(self.path, self._descriptor, self.at, length)
        self._window_at = self.at
        self._digest.update(self._window)


@contextmanager
def open_header(path: str) -> Iterator[tuple[Cursor, FileFacts]]:
    """A cursor at the start of the regular file at `path`, and the file's facts.

    A ValueError of the body becomes a CheckpointError that names the file. Raises what `regular_file` raises too.
    """
    with regular_file(path) as (descriptor, facts):
        try:
            yield Cursor(path, descriptor, facts.size), facts
        except CheckpointError:
            raise
        except Unusable as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; download the file or write it again") from error
