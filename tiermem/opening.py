"""Opening by path or name without naming a pool: the host's daemon if it answers, else this process's own pool."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tiermem.client import shared_client
from tiermem.config import socket_path, value_of
from tiermem.errors import ConfigError, DaemonUnreachable

if TYPE_CHECKING:
    from tiermem.embedded import EmbeddedPool
    from tiermem.model import Model

_own: EmbeddedPool | None = None
_own_pid = 0
_own_lock = threading.Lock()


def open_model(
    path_or_name: str | os.PathLike[str],
    *,
    address: str | None = None,
    writable: bool = False,
    layers: Mapping[str, str] | None = None,
) -> Model:
    """Open a model as a read-only Mapping of tensor name -> numpy array, zero-copy.

    The daemon at `address` (default TIERMEM_ADDRESS, then the host's socket) serves it if it answers; otherwise a pool
    inside this process does, and gives the memory back with the last reader. With `writable` arrays are copy-on-write.
    Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError; DaemonUnreachable only for an `address`
    that was given.
    """
    where = address or str(value_of("address"))
    if address is not None or _has_socket(where):
        try:
            return shared_client(where).open(path_or_name, writable=writable, layers=layers)
        except DaemonUnreachable:
            if address is not None:
                raise
    return _own_pool().open(path_or_name, writable=writable, layers=layers)


def _has_socket(address: str) -> bool:
    try:
        return socket_path(address).exists()
    except (ConfigError, OSError):
        return True  # the client says what is wrong with it


def _own_pool() -> EmbeddedPool:
    global _own, _own_pid
    from tiermem.embedded import EmbeddedPool

    with _own_lock:
        if _own is None or _own_pid != os.getpid():
            _own, _own_pid = EmbeddedPool(transient=True), os.getpid()
        return _own
