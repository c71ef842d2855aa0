"""The one door to the native core: opens it, checks every status, and wraps handles. Holds no state of its own.

A wrapper owns its native handle together with every buffer and every call in progress over it: `close` gives up the
wrapper's share, and the handle is released with the last of them. So closing twice, closing while another thread is
inside, and closing under a live array are all safe; using a closed wrapper raises Closed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from tiermem._ffi import ffi, lib
from tiermem.errors import Closed, NativeError

PAGE_BYTES: int = lib.TM_PAGE_BYTES
E_SHORT: int = -lib.TM_E_SHORT
E_ALIGN: int = -lib.TM_E_ALIGN
E_RANGE: int = -lib.TM_E_RANGE
E_SEALED: int = -lib.TM_E_SEALED
"""What `NativeError.errno` holds where the core, and not the system, refused; above every number of the system."""

_NEXT = {
    errno.EPERM: "mounting needs CAP_SYS_ADMIN, other things the file's owner",
    errno.ENOSPC: "evict a model or give the tier more capacity",
    errno.ENOMEM: "evict a model, or reserve more 2 MiB OS pages where hugetlb is used",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EOPNOTSUPP: "reserved 2 MiB pages have no copy-on-write; map them read-only",
    E_SHORT: "the file changed or was truncated; load it again",
}


def check(status: int, what: str) -> None:
    """Raise NativeError unless `status` is 0. `what` names the attempt and its object: `cannot open /x/y`."""
    if status == 0:
        return
    text = ffi.string(lib.tm_status_text(status)).decode()
    advice = f"; {_NEXT[-status]}" if -status in _NEXT else ""
    raise NativeError(f"{what}: {text}{advice}", -status)


def _path(text: str) -> bytes:
    encoded = os.fsencode(text)
    if b"\0" in encoded:  # C would take what is before it for the path
        raise NativeError(f"{text!r} holds a null character and names no file", errno.EINVAL)
    return encoded


def version() -> str:
    """Version of the native core."""
    text: str = ffi.string(lib.tm_version()).decode()
    return text


def tmpfs_mount(path: str, capacity: int) -> None:
    """Mount a tmpfs on 2 MiB OS pages at directory `path`. Raises NativeError (EPERM without CAP_SYS_ADMIN)."""
    check(lib.tm_tmpfs_mount(_path(path), capacity), f"cannot mount a tmpfs of {capacity} bytes at {path}")


def tmpfs_resize(path: str, capacity: int) -> None:
    """Give the tmpfs mounted at `path` another capacity. Raises NativeError (EINVAL where more is in use)."""
    what = f"cannot resize {path} to {capacity} bytes, less than it holds or no tmpfs"
    check(lib.tm_tmpfs_resize(_path(path), capacity), what)


def tmpfs_unmount(path: str) -> None:
    """Unmount; mappings and open files outlive it."""
    check(lib.tm_tmpfs_unmount(_path(path)), f"cannot unmount {path}")


def tmpfs_detached(capacity: int) -> int:
    """A directory descriptor of a tmpfs on 2 MiB OS pages that is mounted nowhere; it goes with its last user."""
    fd = ffi.new("int *")
    check(lib.tm_tmpfs_detached(capacity, fd), f"cannot make a tmpfs of {capacity} bytes")
    return int(fd[0])


def copy(destination: int, source: int, nbytes: int, threads: int = 1) -> None:
    """Copy between addresses; the memory must be mapped and must not overlap."""
    status = lib.tm_copy(ffi.cast("void *", destination), ffi.cast("void *", source), nbytes, threads)
    check(status, f"cannot copy {nbytes} bytes")


class _Handle:
    """A native handle that lives until its wrapper, its buffers and the calls on it are all gone."""

    noun: ClassVar[str]

    def __init__(self, handle: Any, release: Callable[[Any], None], name: str) -> None:
        self._handle: Any = ffi.gc(handle, release)
        self._name = name

    def _live(self) -> Any:
        """The handle, for the caller to keep in a local variable while a native call uses it."""
        handle = self._handle
        if handle is None:
            raise Closed(f"{self.noun} {self._name} is closed; open it again")
        return handle

    @property
    def closed(self) -> bool:
        return self._handle is None

    def close(self) -> None:
        """Give up this wrapper's share of the handle; idempotent."""
        self._handle = None


def _memory(address: Any, nbytes: int, handle: Any, *, writable: bool) -> memoryview:
    """Bytes at `address` that keep `handle`: the buffer keeps the pointer, its destructor keeps the handle."""
    pointer = ffi.gc(ffi.cast("char *", address), lambda _, owner=handle: None)
    view = memoryview(ffi.buffer(pointer, nbytes))
    return view if writable else view.toreadonly()


class Segment(_Handle):
    """One shared-memory file in whole pages, mapped by its pool: writable until sealed."""

    noun = "segment"

    def __init__(self, handle: Any, name: str, *, sealed: bool) -> None:
        super().__init__(handle, lib.tm_segment_close, name)
        self.name = name
        self.sealed = sealed
        self.nbytes: int = lib.tm_segment_bytes(handle)

    @classmethod
    def create(cls, dirfd: int, name: str, nbytes: int, *, hugetlb: bool = False) -> Segment:
        """A new file in `dirfd`, or an anonymous one where it is -1. Raises NativeError (EEXIST, ENOSPC, ...)."""
        made = ffi.new("tm_segment **")
        flags = lib.TM_SEGMENT_HUGETLB if hugetlb else 0
        status = lib.tm_segment_create(dirfd, _path(name), nbytes, flags, made)
        check(status, f"cannot create segment {name} of {nbytes} bytes")
        return cls(made[0], name, sealed=False)

    @classmethod
    def open(cls, dirfd: int, name: str, nbytes: int) -> Segment:
        """An existing file of exactly `nbytes`, sealed. Raises NativeError."""
        made = ffi.new("tm_segment **")
        status = lib.tm_segment_open(dirfd, _path(name), nbytes, made)
        check(status, f"cannot open segment {name} of {nbytes} bytes")
        return cls(made[0], name, sealed=True)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", lib.tm_segment_address(self._live())))

    def buffer(self) -> memoryview:
        """The mapped bytes; read-only if the segment is sealed. Do not write through an older one after sealing."""
        handle = self._live()
        return _memory(lib.tm_segment_address(handle), self.nbytes, handle, writable=not self.sealed)

    def prefault(self, offset: int = 0, length: int | None = None, threads: int = 1) -> None:
        """Allocate and map the pages of [offset, offset+length), by default all. Raises NativeError."""
        handle = self._live()
        length = self.nbytes - offset if length is None else length
        status = lib.tm_segment_prefault(handle, offset, length, threads)
        check(status, f"cannot prefault {length} bytes at {offset} of segment {self._name}")

    def seal(self) -> None:
        """Make immutable."""
        check(lib.tm_segment_seal(self._live()), f"cannot seal segment {self._name}")
        self.sealed = True

    def share(self) -> int:
        """A new read-only descriptor of the file; the caller closes it."""
        fd = ffi.new("int *")
        check(lib.tm_segment_share(self._live(), fd), f"cannot share segment {self._name}")
        return int(fd[0])


class Stock(_Handle):
    """Prefaulted memory of a backing, kept ahead of need."""

    noun = "stock"

    def __init__(self, dirfd: int, *, hugetlb: bool = False) -> None:
        made = ffi.new("tm_stock **")
        flags = lib.TM_SEGMENT_HUGETLB if hugetlb else 0
        check(lib.tm_stock_open(dirfd, flags, made), "cannot open a stock")
        super().__init__(made[0], lib.tm_stock_close, "of prefaulted memory")

    @property
    def nbytes(self) -> int:
        return int(lib.tm_stock_bytes(self._live()))

    def fill(self, nbytes: int, threads: int = 1) -> float:
        """Add `nbytes`, rounded up to pages; the seconds until they were there. Raises NativeError (ENOSPC)."""
        begin = time.monotonic()
        check(lib.tm_stock_fill(self._live(), nbytes, threads), f"cannot prefault {nbytes} bytes")
        return time.monotonic() - begin

    def take(self, nbytes: int) -> int:
        """Give up to `nbytes`, rounded up to pages, back to the kernel for whoever allocates next; how many it was."""
        taken = ffi.new("uint64_t *")
        check(lib.tm_stock_take(self._live(), nbytes, taken), f"cannot take {nbytes} bytes from the stock")
        return int(taken[0])


class Range(_Handle):
    """One aligned run of addresses in which segments are mapped side by side; unmapped with its last buffer.

    Shared and read-only, or copy-on-write (`cow`). Touching a part of it that nothing is mapped in is a crash.
    """

    noun = "range"

    def __init__(self, handle: Any, *, cow: bool) -> None:
        self.nbytes: int = lib.tm_range_bytes(handle)
        self.cow = cow
        # Shared with the destructor, which must not hold the wrapper itself.
        self._callbacks = callbacks = list[Callable[[], None]]()

        def release(range_: Any) -> None:
            lib.tm_range_release(range_)
            for callback in callbacks:
                callback()

        super().__init__(handle, release, f"of {self.nbytes} bytes")

    @classmethod
    def reserve(cls, nbytes: int, *, cow: bool = False) -> Range:
        """Addresses for `nbytes`, rounded up to pages, 2 MiB aligned. Raises NativeError."""
        made = ffi.new("tm_range **")
        check(lib.tm_range_reserve(nbytes, made), f"cannot reserve {nbytes} bytes of addresses")
        return cls(made[0], cow=cow)

    def on_release(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the memory is unmapped, possibly from inside a garbage collection."""
        self._callbacks.append(callback)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", lib.tm_range_address(self._live())))

    def map(self, offset: int, fd: int, length: int) -> None:
        """Map the first `length` bytes of file `fd` at `offset`, a multiple of a page. The caller keeps `fd`."""
        mode = lib.TM_MAP_COW if self.cow else lib.TM_MAP_SHARED
        status = lib.tm_range_map(self._live(), offset, fd, length, mode)
        check(status, f"cannot map {length} bytes at {offset} of a range of {self.nbytes}")

    def buffer(self) -> memoryview:
        """All bytes of the range; writable if it is copy-on-write."""
        handle = self._live()
        return _memory(lib.tm_range_address(handle), self.nbytes, handle, writable=self.cow)


class Staging(_Handle):
    """Prefaulted memory that a direct read passes through; for one thread at a time."""

    noun = "staging"

    def __init__(self, nbytes: int) -> None:
        made = ffi.new("void **")
        check(lib.tm_staging_alloc(nbytes, made), f"cannot allocate {nbytes} bytes of staging memory")
        self.nbytes = nbytes
        super().__init__(made[0], lambda staging: lib.tm_staging_free(staging, nbytes), f"of {nbytes} bytes")


class Reader(_Handle):
    """Reads a file past the page cache, or from it where it holds the bytes already."""

    noun = "reader"

    def __init__(self, path: str) -> None:
        """Open a regular file. Raises NativeError (EINVAL for anything else)."""
        made = ffi.new("tm_reader **")
        check(lib.tm_reader_open(_path(path), made), f"cannot open {path}")
        super().__init__(made[0], lib.tm_reader_close, path)

    @property
    def fd(self) -> int:
        """The buffered descriptor, for fstat; the reader keeps it."""
        return int(lib.tm_reader_fd(self._live()))

    @property
    def is_direct(self) -> bool:
        """Whether reads can go past the page cache."""
        return bool(lib.tm_reader_is_direct(self._live()))

    def cached(self, offset: int, length: int) -> int:
        """Bytes of [offset, offset+length) in the page cache. Raises NativeError (ENOSYS before Linux 6.5)."""
        held = ffi.new("uint64_t *")
        status = lib.tm_reader_cached(self._live(), offset, length, held)
        check(status, f"cannot ask for the cached bytes of {self._name}")
        return int(held[0])

    def read(self, parts: Sequence[tuple[int, int, int]], staging: Staging) -> None:
        """Read ascending, disjoint (file offset, length, destination address); destinations must be writable memory.

        Raises NativeError (E_SHORT if the file ends early).
        """
        handle, through = self._live(), staging._live()
        native = ffi.new("tm_part[]", [(offset, length, ffi.cast("void *", to)) for offset, length, to in parts])
        status = lib.tm_reader_read(handle, native, len(parts), through, staging.nbytes)
        if status:
            span = f"bytes {parts[0][0]} to {parts[-1][0] + parts[-1][1]}" if parts else "nothing"
            check(status, f"cannot read {span} of {self._name}")
