"""Shared memory: file systems of segments, segments, the stock, ranges of addresses, and copies between them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

from tiermem._native.door import Handle, check, ffi, lib, memory, path_bytes
from tiermem.errors import Closed


def tmpfs_mount(path: str, capacity: int) -> None:
    """Mount a tmpfs on 2 MiB OS pages at directory `path`. Raises NativeError (EPERM without CAP_SYS_ADMIN)."""
    check(lib.tm_tmpfs_mount(path_bytes(path), capacity), f"cannot mount a tmpfs of {capacity} bytes at {path}")


def tmpfs_resize(path: str, capacity: int) -> None:
    """Give the tmpfs mounted at `path` another capacity. Raises NativeError (EINVAL where more is in use)."""
    what = f"cannot resize {path} to {capacity} bytes, less than it holds or no tmpfs"
    check(lib.tm_tmpfs_resize(path_bytes(path), capacity), what)


def tmpfs_unmount(path: str) -> None:
    """Unmount; mappings and open files outlive it."""
    check(lib.tm_tmpfs_unmount(path_bytes(path)), f"cannot unmount {path}")


def tmpfs_detached(capacity: int) -> int:
    """A directory descriptor of a tmpfs on 2 MiB OS pages that is mounted nowhere; it goes with its last user."""
    fd = ffi.new("int *")
    check(lib.tm_tmpfs_detached(capacity, fd), f"cannot make a tmpfs of {capacity} bytes")
    return int(fd[0])


def copy(destination: int, source: int, nbytes: int, threads: int = 1) -> None:
    """Copy between addresses; the memory must be mapped and must not overlap."""
    status = lib.tm_copy(ffi.cast("void *", destination), ffi.cast("void *", source), nbytes, threads)
    check(status, f"cannot copy {nbytes} bytes")


class Segment(Handle):
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
        status = lib.tm_segment_create(dirfd, path_bytes(name), nbytes, flags, made)
        check(status, f"cannot create segment {name} of {nbytes} bytes")
        return cls(made[0], name, sealed=False)

    @classmethod
    def open(cls, dirfd: int, name: str, nbytes: int) -> Segment:
        """An existing file of exactly `nbytes`, sealed. Raises NativeError."""
        made = ffi.new("tm_segment **")
        status = lib.tm_segment_open(dirfd, path_bytes(name), nbytes, made)
        check(status, f"cannot open segment {name} of {nbytes} bytes")
        return cls(made[0], name, sealed=True)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", lib.tm_segment_address(self.live())))

    def buffer(self) -> memoryview:
        """The mapped bytes; read-only if the segment is sealed. Do not write through an older one after sealing."""
        handle = self.live()
        return memory(lib.tm_segment_address(handle), self.nbytes, handle, writable=not self.sealed)

    def prefault(self, offset: int = 0, length: int | None = None, threads: int = 1, nodes: int = 0) -> None:
        """Allocate and map the pages of [offset, offset+length), by default all; new ones come from the nodes whose
        bits are in `nodes`, from others where these are full. Raises NativeError (ENOSPC; ENODEV: no such node)."""
        handle = self.live()
        length = self.nbytes - offset if length is None else length
        status = lib.tm_segment_prefault(handle, offset, length, threads, nodes)
        check(status, f"cannot prefault {length} bytes at {offset} of segment {self._name}")

    def seal(self) -> None:
        """Make immutable."""
        check(lib.tm_segment_seal(self.live()), f"cannot seal segment {self._name}")
        self.sealed = True

    def share(self) -> int:
        """A new read-only descriptor of the file; the caller closes it."""
        fd = ffi.new("int *")
        check(lib.tm_segment_share(self.live(), fd), f"cannot share segment {self._name}")
        return int(fd[0])

    def lend(self) -> int:
        """The same, but writable, for whoever fills the segment. Raises NativeError once it is sealed."""
        fd = ffi.new("int *")
        check(lib.tm_segment_lend(self.live(), fd), f"cannot lend segment {self._name}")
        return int(fd[0])

    @property
    def fileno(self) -> int:
        """The segment's own descriptor, which stays the segment's."""
        return int(lib.tm_segment_fd(self.live()))


class Stock(Handle):
    """Prefaulted memory of a backing, kept ahead of need."""

    noun = "stock"

    def __init__(self, dirfd: int, *, hugetlb: bool = False) -> None:
        made = ffi.new("tm_stock **")
        flags = lib.TM_SEGMENT_HUGETLB if hugetlb else 0
        check(lib.tm_stock_open(dirfd, flags, made), "cannot open a stock")
        super().__init__(made[0], lib.tm_stock_close, "of prefaulted memory")

    @property
    def nbytes(self) -> int:
        return int(lib.tm_stock_bytes(self.live()))

    def fill(self, nbytes: int, threads: int = 1) -> float:
        """Add `nbytes`, rounded up to pages; the seconds until they were there. Raises NativeError (ENOSPC)."""
        begin = time.monotonic()
        check(lib.tm_stock_fill(self.live(), nbytes, threads), f"cannot prefault {nbytes} bytes")
        return time.monotonic() - begin

    def take(self, nbytes: int) -> int:
        """Give up to `nbytes`, rounded up to pages, back to the kernel for whoever allocates next; how many it was."""
        taken = ffi.new("uint64_t *")
        check(lib.tm_stock_take(self.live(), nbytes, taken), f"cannot take {nbytes} bytes from the stock")
        return int(taken[0])


class Access(Enum):
    """How a range's memory may be used: read, written to privately, or written to for all (an unsealed segment)."""

    SHARED = lib.TM_MAP_SHARED
    COW = lib.TM_MAP_COW
    FILL = lib.TM_MAP_FILL


class Range(Handle):
    """One aligned run of addresses in which segments are mapped side by side; unmapped with its last buffer.

    Shared and read-only, copy-on-write, or being filled (see `Access`). Touching a part of it that nothing is mapped in
    is a crash.
    """

    noun = "range"

    def __init__(self, handle: Any, access: Access) -> None:
        self.nbytes: int = lib.tm_range_bytes(handle)
        self.access = access
        # Shared with the destructor, which must not hold the wrapper itself.
        self._before, self._after = before, after = list[Callable[[], None]](), list[Callable[[], None]]()

        def release(range_: Any) -> None:
            for callback in before:
                callback()
            lib.tm_range_release(range_)
            for callback in after:
                callback()

        super().__init__(handle, release, f"of {self.nbytes} bytes")

    @classmethod
    def reserve(cls, nbytes: int, access: Access = Access.SHARED) -> Range:
        """Addresses for `nbytes`, rounded up to pages, 2 MiB aligned. Raises NativeError."""
        made = ffi.new("tm_range **")
        check(lib.tm_range_reserve(nbytes, made), f"cannot reserve {nbytes} bytes of addresses")
        return cls(made[0], access)

    @property
    def cow(self) -> bool:
        return self.access is Access.COW

    def before_release(self, callback: Callable[[], None]) -> None:
        """Have `callback` called just before the memory is unmapped, possibly from inside a garbage collection."""
        self._before.append(callback)

    def on_release(self, callback: Callable[[], None]) -> None:
        """The same, once the memory is unmapped."""
        self._after.append(callback)

    @property
    def address(self) -> int:
        return int(ffi.cast("uintptr_t", lib.tm_range_address(self.live())))

    def map(self, offset: int, fd: int, length: int) -> None:
        """Map the first `length` bytes of file `fd` at `offset`, a multiple of a page. The caller keeps `fd`."""
        status = lib.tm_range_map(self.live(), offset, fd, length, self.access.value)
        check(status, f"cannot map {length} bytes at {offset} of a range of {self.nbytes}")

    def protect(self) -> None:
        """What was filled is shared and read-only from now on; who writes through an older buffer crashes."""
        check(lib.tm_range_protect(self.live()), f"cannot protect a range of {self.nbytes} bytes")
        self.access = Access.SHARED

    def buffer(self) -> memoryview:
        """All bytes of the range; writable unless it is shared."""
        handle = self.live()
        return memory(lib.tm_range_address(handle), self.nbytes, handle, writable=self.access is not Access.SHARED)

    def reference(self) -> RangeReference:
        """The range without a share in it."""
        return RangeReference(self)


class RangeReference:
    """A range that others keep mapped, this does not: it has ended once wrapper, buffers and calls are gone."""

    def __init__(self, range_: Range) -> None:
        handle = range_.live()
        self.address = int(ffi.cast("uintptr_t", lib.tm_range_address(handle)))
        self.nbytes = range_.nbytes
        self.cow = range_.cow
        self._handle = weakref.ref(handle)

    def live(self) -> Any:
        """The handle: memory stays mapped for as long as the caller holds it. Raises Closed."""
        handle = self._handle()
        if handle is None:
            raise Closed(f"the range of {self.nbytes} bytes at {self.address:#x} is unmapped; map the model again")
        return handle

    @property
    def closed(self) -> bool:
        return self._handle() is None
