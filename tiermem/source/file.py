"""File source: a checkpoint's bytes from its files, past the page cache where they are not in it.

Opens each file at its first read and keeps it open, so that a file that is replaced meanwhile is read to its end as
it was. Never decides what is read; never believes that a file stayed what it was (`check`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from tiermem import _native
from tiermem.checkpoint import check_unchanged
from tiermem.errors import NativeError, ReadError
from tiermem.source.fill import Fill
from tiermem.types import CheckpointFile


class FileSource:
    """Reads from the files of one manifest. Several threads may read at once, each with its own staging memory."""

    def __init__(self, files: Sequence[CheckpointFile]) -> None:
        self._files = files
        self._readers: dict[int, _native.Reader] = {}
        self._opening = threading.Lock()

    @property
    def reads_at_once(self) -> None:
        return None

    @property
    def whole_segments(self) -> bool:
        return False

    def read(self, file: int, fills: Sequence[Fill], staging: _native.Staging) -> None:
        """Fill the parts of file number `file`. Raises ReadError or CheckpointChanged."""
        reader = self._reader(file)
        try:
            reader.read([fill[:3] for fill in fills], staging)
        except NativeError as error:
            self.check()
            path, first, last = self._files[file].path, fills[0], fills[-1]
            end = last.file_offset + last.length
            raise ReadError(f"{path}: bytes {first.file_offset} to {end}: {error}; check the disk") from error

    def disbelieve(self, tensor: int) -> bool:
        """Files are read as they are: never again."""
        return False

    def check(self) -> None:
        """Raise CheckpointChanged unless every file read from still has the size, time and inode of the manifest."""
        for number, reader in list(self._readers.items()):
            check_unchanged(self._files[number], reader.fd)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _reader(self, number: int) -> _native.Reader:
        with self._opening:
            reader = self._readers.get(number)
            if reader is None:
                path = self._files[number].path
                try:
                    reader = self._readers[number] = _native.Reader(path)
                except NativeError as error:
                    raise ReadError(f"{path}: {error}; check that the file exists and may be read") from error
        self.check()
        return reader
