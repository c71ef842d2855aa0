"""Files to memory: readers, and the staging memory that direct reads pass through."""

from __future__ import annotations

from collections.abc import Sequence

from tiermem._native.door import Handle, check, ffi, lib, path_bytes


class Staging(Handle):
    """Prefaulted memory that a direct read passes through; for one thread at a time."""

    noun = "staging"

    def __init__(self, nbytes: int) -> None:
        made = ffi.new("void **")
        check(lib.tm_staging_alloc(nbytes, made), f"cannot allocate {nbytes} bytes of staging memory")
        self.nbytes = nbytes
        super().__init__(made[0], lambda staging: lib.tm_staging_free(staging, nbytes), f"of {nbytes} bytes")


class Reader(Handle):
    """Reads a file past the page cache, or from it where it holds the bytes already."""

    noun = "reader"

    def __init__(self, path: str) -> None:
        """Open a regular file. Raises NativeError (EINVAL for anything else)."""
        made = ffi.new("tm_reader **")
        check(lib.tm_reader_open(path_bytes(path), made), f"cannot open {path}")
        super().__init__(made[0], lib.tm_reader_close, path)

    @property
    def fd(self) -> int:
        """The buffered descriptor, for fstat; the reader keeps it."""
        return int(lib.tm_reader_fd(self.live()))

    @property
    def is_direct(self) -> bool:
        """Whether reads can go past the page cache."""
        return bool(lib.tm_reader_is_direct(self.live()))

    def cached(self, offset: int, length: int) -> int:
        """Bytes of [offset, offset+length) in the page cache. Raises NativeError (ENOSYS before Linux 6.5)."""
        held = ffi.new("uint64_t *")
        status = lib.tm_reader_cached(self.live(), offset, length, held)
        check(status, f"cannot ask for the cached bytes of {self._name}")
        return int(held[0])

    def read(self, parts: Sequence[tuple[int, int, int]], staging: Staging) -> None:
        """Read ascending, disjoint (file offset, length, destination address); destinations must be writable memory.

        Raises NativeError (E_SHORT if the file ends early).
        """
        handle, through = self.live(), staging.live()
        native = ffi.new("tm_part[]", [(offset, length, ffi.cast("void *", to)) for offset, length, to in parts])
        status = lib.tm_reader_read(handle, native, len(parts), through, staging.nbytes)
        if status:
            span = f"bytes {parts[0][0]} to {parts[-1][0] + parts[-1][1]}" if parts else "nothing"
            check(status, f"cannot read {span} of {self._name}")
