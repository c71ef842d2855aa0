"""The files of a checkpoint: opens them as regular files, reads exactly, and tells by cheap facts whether one changed.

Never reads a tensor, never interprets a byte, never writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from stat import S_ISREG
from typing import NamedTuple

from tiermem.errors import AccessDenied, CheckpointChanged, CheckpointError, CheckpointNotFound, ReadError, TiermemError
from tiermem.types import CheckpointFile


class FileFacts(NamedTuple):
    """What tells one state of a file from another, without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def file_facts(file: str | int) -> FileFacts:
    """Facts of the file at a path (links followed) or behind an open descriptor.

    Raises CheckpointNotFound, AccessDenied or ReadError.
    """
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:
        raise _unreadable(str(file), error) from error
    return FileFacts(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def check_unchanged(file: CheckpointFile, descriptor: int | None = None) -> None:
    """Raise CheckpointChanged unless the file, or the descriptor opened on it, is still the one that was parsed."""
    now = file_facts(file.path if descriptor is None else descriptor)
    then = FileFacts(file.device, file.inode, file.size, file.mtime_ns)
    if now != then:
        changes = [f"{fact} {a} -> {b}" for fact, a, b in zip(FileFacts._fields, then, now, strict=True) if a != b]
        raise CheckpointChanged(
            f"{file.path}: changed since its header was read ({', '.join(changes)}); load it again once it is at rest"
        )


@contextmanager
def regular_file(path: str) -> Iterator[tuple[int, FileFacts]]:
    """An open descriptor of the regular file at `path`, and its facts.

    Raises CheckpointNotFound, AccessDenied, ReadError, or CheckpointError for anything but a regular file: a FIFO or
    a device is refused without waiting for its other end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        if not S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: is not a regular file; name a file that holds weights")
        yield descriptor, file_facts(descriptor)
    finally:
        os.close(descriptor)


def read_exactly(path: str, descriptor: int, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`. Raises ReadError, or CheckpointChanged where the file ends early.

    The caller has compared both with the file's size, so an early end means that the file shrank meanwhile.
    """
    parts: list[bytes] = []
    left = length
    while left:
        try:
            part = os.pread(descriptor, left, offset + length - left)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not part:
            raise CheckpointChanged(f"{path}: shrank while it was read; load it again once it is at rest")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def directory_names(path: str) -> list[str]:
    """Names in the directory at `path`, sorted, hidden ones left out. Raises as `file_facts` does."""
    try:
        return sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError | ValueError) -> TiermemError:
    # ValueError: the path itself cannot be a file's name (NUL, lone surrogate).
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return CheckpointNotFound(f"{path}: no such file; check the path")
    if isinstance(error, PermissionError):
        return AccessDenied(f"{path}: may not be read by user {os.geteuid()}; grant read permission")
    return ReadError(f"{path}: cannot be read ({error.strerror}); check the path and its disk")
