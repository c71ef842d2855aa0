"""Backing: where a pool's segment files live, chosen by probing; and the segments in it.

Owns one directory (or none: anonymous memory). Never decides which bytes go into a segment.

| kind    | OS pages | needs                                    | outlives its pool |
|---------|----------|------------------------------------------|-------------------|
| tmpfs   | 2 MiB    | CAP_SYS_ADMIN (a mount of our own)       | with a directory  |
| hugetlb | 2 MiB    | reserved pages (`vm.nr_hugepages`)       | with a hugetlbfs  |
| shm     | 4 KiB    | /dev/shm                                 | yes               |
| memfd   | 4 KiB    | nothing                                  | no                |
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from tiermem import _native
from tiermem.errors import CapacityError, ConfigError, NativeError, Refused
from tiermem.types import PAGE_BYTES, pages_of
from tiermem.units import format_bytes

_SHM = Path("/dev/shm")


class Backing:
    """Segment files of one pool. `kind` and `reason` say what was chosen and why."""

    def __init__(self, kind: str, reason: str, dirfd: int, directory: Path | None, mounted: bool = False) -> None:
        self.kind = kind
        self.reason = reason
        self.directory = directory
        self._dirfd = dirfd
        self._mounted = mounted

    @property
    def survives(self) -> bool:
        """Whether a new daemon can adopt the segments."""
        return self.directory is not None

    def create(self, key: str, nbytes: int) -> _native.Segment:
        """A new writable segment file of whole pages, not yet prefaulted."""
        return _native.Segment.create(self._dirfd, key, nbytes, hugetlb=self.kind == "hugetlb")

    def adopt(self, key: str, nbytes: int) -> _native.Segment:
        """A segment that an earlier pool left, read-only. Raises NativeError where it is missing or cut."""
        return _native.Segment.open(self._dirfd, key, nbytes)

    def stock(self) -> _native.Stock:
        """An empty stock of prefaulted memory of this backing."""
        return _native.Stock(self._dirfd, hugetlb=self.kind == "hugetlb")

    def unlink(self, key: str) -> None:
        """Give a segment's memory back once its last mapping is gone. Mappings keep their bytes."""
        if self._dirfd >= 0:
            # Cleaners of /dev/shm may have been there first (logind's RemoveIPC).
            with contextlib.suppress(FileNotFoundError):
                os.unlink(key, dir_fd=self._dirfd)

    def keys(self) -> list[str]:
        """Segment files present in the directory."""
        return sorted(os.listdir(self._dirfd)) if self.survives else []

    def path(self, key: str) -> str | None:
        """The path of a segment's file; None where it has none."""
        return str(self.directory / key) if self.directory is not None else None

    def close(self, keep: bool) -> None:
        """Forget the backing; unless `keep`, remove its files and unmount what was mounted for it."""
        if self.directory is not None and not keep:
            for key in self.keys():
                self.unlink(key)
        if self._dirfd >= 0:
            os.close(self._dirfd)
            self._dirfd = -1
        if self.directory is not None and not keep:
            if self._mounted:
                _native.tmpfs_unmount(str(self.directory))
            self.directory.rmdir()


def _mounts(kind: str) -> dict[Path, str]:
    """Mount points of file-system type `kind` -> mount options."""
    found = {}
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).rstrip("\n").split("\n"):
        mount, _, super_block = line.partition(" - ")
        fs_type, _, options = super_block.split(" ", 2)
        if fs_type == kind:
            # proc(5): space, tab, newline and backslash are octal, everything else is as it is.
            found[Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split(" ")[4]))] = options
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _opened(directory: Path) -> int:
    os.makedirs(directory, mode=0o700, exist_ok=True)
    # No link: where anyone may write, someone else's would lead us to files that are not segments.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise Refused(f"{directory} belongs to another user; choose another state directory (--state)")
    return fd


def _tmpfs(directory: Path | None, capacity: int) -> Backing:
    if "[deny]" in _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled"):
        raise NativeError("2 MiB OS pages are denied by /sys/kernel/mm/transparent_hugepage/shmem_enabled")
    # One page of slack: a mount that is exactly full cannot even create an empty file.
    size = capacity + PAGE_BYTES
    if directory is None:
        return Backing("tmpfs", "a tmpfs of our own with huge=always", _native.tmpfs_detached(size), None)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    options = _mounts("tmpfs").get(directory)
    if options is None:
        _native.tmpfs_mount(str(directory), size)
    elif "huge=always" not in options:
        raise NativeError(f"{directory} is a tmpfs without huge=always")
    else:
        try:
            _native.tmpfs_resize(str(directory), size)
        except NativeError as error:
            # An earlier, larger pool left more than that. The tier counts what may stay of it; adoption frees the rest.
            if error.errno != errno.EINVAL:
                raise
    return Backing("tmpfs", "a tmpfs of our own with huge=always", _opened(directory), directory, mounted=True)


def _hugetlb(directory: Path | None, capacity: int) -> Backing:
    home = None
    for mount, options in _mounts("hugetlbfs").items():
        if directory is not None and "pagesize=2M" in options and os.access(mount, os.W_OK):
            home = mount / _private_name(directory)
    facts = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    free = int(_read(f"{facts}/free_hugepages") or 0) * PAGE_BYTES + _held(home)
    if free < capacity:
        pages = int(_read(f"{facts}/nr_hugepages") or 0) + pages_of(capacity - free)
        raise NativeError(
            f"{format_bytes(free)} of 2 MiB pages are reserved and free, {format_bytes(capacity)} are needed; "
            f"write {pages} to /proc/sys/vm/nr_hugepages"
        )
    if home is None:
        return Backing("hugetlb", "reserved 2 MiB pages", -1, None)
    return Backing("hugetlb", f"reserved 2 MiB pages on {home.parent}", _opened(home), home)


def _shm(directory: Path | None, capacity: int) -> Backing:
    if directory is None:
        raise NativeError("an embedded pool leaves no files in /dev/shm")
    home = _SHM / _private_name(directory)
    space = os.statvfs(_SHM)
    free = space.f_bavail * space.f_frsize + _held(home)
    if free < capacity:
        raise NativeError(f"{_SHM} has {format_bytes(free)} free, {format_bytes(capacity)} are needed")
    return Backing("shm", "files on 4 KiB OS pages", _opened(home), home)


def _memfd(directory: Path | None, capacity: int) -> Backing:
    return Backing("memfd", "anonymous memory on 4 KiB OS pages, lost with the daemon", -1, None)


def _held(home: Path | None) -> int:
    """Bytes of the segments that an earlier pool left there, for this one to adopt."""
    if home is None or not home.is_dir():
        return 0
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(home))


def _private_name(directory: Path) -> str:
    return f"tiermem-{os.geteuid()}-{hashlib.sha256(str(directory).encode()).hexdigest()[:12]}"


_KINDS: dict[str, Callable[[Path | None, int], Backing]] = {
    "tmpfs": _tmpfs, "hugetlb": _hugetlb, "shm": _shm, "memfd": _memfd,
}  # fmt: skip


def open_backing(kind: str, directory: Path | None, capacity: int) -> Backing:
    """The backing `kind`, or for "auto" the first of the table that this host and these rights allow.

    `directory` None makes an embedded pool's backing, which leaves no trace. Raises ConfigError where the kind that
    was asked for cannot be had.
    """
    if kind not in ("auto", *_KINDS):
        raise ConfigError(f"backing {kind!r} is unknown; choose auto, {', '.join(_KINDS)}")
    # As the kernel names it in its list of mounts.
    directory = directory and directory.resolve()
    refused = []
    for name in _KINDS if kind == "auto" else (kind,):
        try:
            backing = _KINDS[name](directory, capacity)
        except (NativeError, OSError) as error:
            refused.append(f"{name}: {error}")
            continue
        if refused:
            backing.reason += f" (not {'; not '.join(refused)})"
        return backing
    raise ConfigError(f"no backing for segments: {'; '.join(refused)}; choose another with --backing")


def allocate(backing: Backing, key: str, nbytes: int) -> _native.Segment:
    """`backing.create`, with a lack of memory told as CapacityError."""
    try:
        return backing.create(key, nbytes)
    except NativeError as error:
        raise CapacityError(
            f"segment {key} of {format_bytes(nbytes)} could not be made on {backing.kind}: {error}"
        ) from error
