"""The door itself: the extension, the check of every status, and what a handle is. Wraps no noun of the core."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, ClassVar

from tiermem._ffi import ffi as ffi
from tiermem._ffi import lib as lib
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


def path_bytes(text: str) -> bytes:
    encoded = os.fsencode(text)
    if b"\0" in encoded:  # C would take what is before it for the path
        raise NativeError(f"{text!r} holds a null character and names no file", errno.EINVAL)
    return encoded


def version() -> str:
    """Version of the native core."""
    text: str = ffi.string(lib.tm_version()).decode()
    return text


class Handle:
    """A native handle that lives until its wrapper, its buffers and the calls on it are all gone."""

    noun: ClassVar[str]

    def __init__(self, handle: Any, release: Callable[[Any], None], name: str) -> None:
        self._handle: Any = ffi.gc(handle, release)
        self._name = name

    def live(self) -> Any:
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


def memory(address: Any, nbytes: int, handle: Any, *, writable: bool) -> memoryview:
    """Bytes at `address` that keep `handle`: the buffer keeps the pointer, its destructor keeps the handle."""
    pointer = ffi.gc(ffi.cast("char *", address), lambda _, owner=handle: None)
    view = memoryview(ffi.buffer(pointer, nbytes))
    return view if writable else view.toreadonly()
