"""Facts of this host: what it can do for a pool, and for the rest why not and what would change that.

Owns reading /proc, /sys and the names in /dev. Never writes, mounts, allocates or raises: a file that is missing is a
fact too. Every function takes the root of the tree it reads, so that a test can build one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path

from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes

ROOT = Path("/")
CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_PERFMON = 14, 21, 23, 38
"""Bit numbers of capability.h."""
_HUGETLB = "sys/kernel/mm/hugepages/hugepages-2048kB"
_SHMEM_ENABLED = "sys/kernel/mm/transparent_hugepage/shmem_enabled"
_SEGMENTS_WANTED = 4096  # about a hundred models of forty layers


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether this host can do something. `reason` says with what, or why not and what to do."""

    available: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Memory:
    """`limit_bytes` is the tightest limit of our control groups (version 2), None where there is none."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None

    @property
    def usable_bytes(self) -> int:
        return self.total_bytes if self.limit_bytes is None else min(self.total_bytes, self.limit_bytes)


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One NUMA node; one with memory and no CPUs (`cpus` is empty) may be CXL memory."""

    number: int
    cpus: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Storage:
    """The file system of a directory, and whether its files can be read past the page cache."""

    directory: str
    filesystem: str
    mount_point: str
    direct: Capability


@dataclass(frozen=True, slots=True)
class Host:
    """All facts. `shm_bytes` is the room left in /dev/shm, `hugetlb_free_bytes` that in reserved 2 MiB OS pages."""

    name: str
    kernel: str
    memory: Memory
    nodes: tuple[NumaNode, ...]
    shm_bytes: int
    hugetlb_free_bytes: int
    tmpfs: Capability
    hugetlb: Capability
    shm: Capability
    memfd: Capability
    populate: Capability
    cxl: Capability
    migration: Capability
    rdma: Capability
    memlock: Capability
    accelerator: Capability
    segments: Capability

    def capabilities(self) -> dict[str, Capability]:
        """Every capability by its name, in the order above."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Capability)}


def probe(root: Path = ROOT) -> Host:
    """The facts of the host whose /proc, /sys and /dev are under `root`. Takes milliseconds."""
    nodes = numa_nodes(root)
    shm_bytes = _shm_bytes(root)
    hugetlb_bytes = _number(root, f"{_HUGETLB}/free_hugepages") * PAGE_BYTES
    return Host(
        name=_read(root, "proc/sys/kernel/hostname"),
        kernel=_read(root, "proc/sys/kernel/osrelease"),
        memory=memory(root),
        nodes=nodes,
        shm_bytes=shm_bytes,
        hugetlb_free_bytes=hugetlb_bytes,
        tmpfs=_tmpfs(root),
        hugetlb=_hugetlb(root, hugetlb_bytes),
        shm=_shm(root, shm_bytes),
        memfd=_memfd(root),
        populate=_populate(root),
        cxl=_cxl(root, nodes),
        migration=_migration(root),
        rdma=rdma(root),
        memlock=memlock(root),
        accelerator=_accelerator(root),
        segments=_segments(root),
    )


def memory(root: Path = ROOT) -> Memory:
    """Memory of the host, and what our control groups leave of it."""
    facts = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read(root, "proc/meminfo"), re.MULTILINE))
    total, available = (int(facts.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    group = re.search(r"^0::/(.*)$", _read(root, "proc/self/cgroup"), re.MULTILINE)
    parts = Path(group[1].lstrip("/")).parts if group else ()
    paths = ["/".join(("sys/fs/cgroup", *parts[:depth], "memory.max")) for depth in range(len(parts) + 1)]
    limits = [int(text) for text in (_read(root, path) for path in paths) if text.isdecimal()]
    return Memory(total, available, min(limits, default=None))


def numa_nodes(root: Path = ROOT) -> tuple[NumaNode, ...]:
    """NUMA nodes by number; empty where the kernel knows none."""
    nodes = []
    for name in _names(root, "sys/devices/system/node", r"node\d+"):
        path = f"sys/devices/system/node/{name}"
        facts = dict(re.findall(r"(MemTotal|MemFree):\s+(\d+) kB", _read(root, f"{path}/meminfo")))
        total, free = (int(facts.get(key, 0)) * 1024 for key in ("MemTotal", "MemFree"))
        nodes.append(NumaNode(int(name.removeprefix("node")), _read(root, f"{path}/cpulist"), total, free))
    return tuple(sorted(nodes, key=lambda node: node.number))


def nodes_with_memory(root: Path = ROOT) -> str:
    """The kernel's list of NUMA nodes that have memory, such as `0-1`: what changes when one comes or goes."""
    return _read(root, "sys/devices/system/node/has_memory")


def storage(directory: str | Path, root: Path = ROOT) -> Storage:
    """The file system that holds `directory`. Opens, and closes, one of its files to try O_DIRECT."""
    path = os.path.realpath(directory)
    holders = [mount for mount in _mounts(root) if Path(path).is_relative_to(mount[0])]
    # Of two mounts at one place the later one hides the earlier, so max must prefer the last.
    point, kind, _ = max(reversed(holders), key=lambda mount: len(mount[0]), default=("", "unknown", ""))
    return Storage(path, kind, point, _direct(path))


def rdma(root: Path = ROOT) -> Capability:
    """Devices that read other hosts' memory."""
    if devices := _names(root, "sys/class/infiniband", r".+"):
        return Capability(True, ", ".join(devices))
    return Capability(False, "no RDMA device; rdma link add rxe0 type rxe netdev DEVICE makes a software one")


def memlock(root: Path = ROOT) -> Capability:
    """Whether memory may be pinned, as registering it for RDMA does."""
    if has_capability(root, CAP_IPC_LOCK):
        return Capability(True, "CAP_IPC_LOCK: any memory may be pinned for RDMA")
    limit = re.search(r"^Max locked memory\s+(\S+)", _read(root, "proc/self/limits"), re.MULTILINE)
    text = limit[1] if limit else "0"
    if text == "unlimited":
        return Capability(True, "any memory may be pinned for RDMA")
    nbytes = int(text) if text.isdecimal() else 0
    reason = f"{format_bytes(nbytes)} may be pinned for RDMA"
    if nbytes and nbytes >= memory(root).usable_bytes // 2:
        return Capability(True, reason)
    return Capability(False, f"only {reason}; raise ulimit -l or LimitMEMLOCK= to what models take, or to unlimited")


def _direct(directory: str) -> Capability:
    try:
        with os.scandir(directory) as entries:
            file = next((entry.path for entry in entries if entry.is_file()), None)
    except OSError as error:
        return Capability(False, f"{directory}: {error.strerror}")
    if file is None:
        return Capability(False, "no file here to try it with; name a directory that holds a checkpoint")
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return Capability(False, f"O_DIRECT: {error.strerror}; reads go through the page cache")
    return Capability(True, "O_DIRECT: reads bypass the page cache")


def _tmpfs(root: Path) -> Capability:
    shmem = _selected(root, _SHMEM_ENABLED)
    if not shmem:
        return Capability(False, "the kernel has no transparent huge pages; use one with CONFIG_TRANSPARENT_HUGEPAGE")
    if shmem == "deny":
        return Capability(False, f"huge pages are denied to tmpfs; write never to /{_SHMEM_ENABLED}")
    if not has_capability(root, CAP_SYS_ADMIN):
        return Capability(False, "no CAP_SYS_ADMIN; run as root or with AmbientCapabilities=CAP_SYS_ADMIN")
    return Capability(True, "a tmpfs of our own with huge=always: 2 MiB OS pages")


def _hugetlb(root: Path, free_bytes: int) -> Capability:
    total = _number(root, f"{_HUGETLB}/nr_hugepages")
    if free_bytes:
        return Capability(True, f"{format_bytes(free_bytes)} of reserved 2 MiB OS pages are free")
    state = f"all {total} reserved 2 MiB OS pages are in use" if total else "no 2 MiB OS pages are reserved"
    return Capability(False, f"{state}; reserve with sysctl vm.nr_hugepages=COUNT")


def _shm(root: Path, room_bytes: int) -> Capability:
    mount = _mount_at("/dev/shm", root)
    if mount is None:
        return Capability(False, "/dev/shm is no tmpfs; mount one there")
    pages = "2 MiB" if "huge=always" in mount.split(",") else "4 KiB"
    return Capability(True, f"files in /dev/shm, room for {format_bytes(room_bytes)}: {pages} OS pages")


def _shm_bytes(root: Path) -> int:
    """Room left in /dev/shm; containers often get 64 MiB of it."""
    try:
        space = os.statvfs(root / "dev/shm")
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize if _mount_at("/dev/shm", root) is not None else 0


def _memfd(root: Path) -> Capability:
    huge = _selected(root, _SHMEM_ENABLED) in ("always", "force", "within_size", "advise")
    pages = "2 MiB" if huge else "4 KiB"
    return Capability(True, f"anonymous files: {pages} OS pages; they end with the daemon and its clients")


def _populate(root: Path) -> Capability:
    if kernel_version(root) >= (5, 14):
        return Capability(True, "MADV_POPULATE_WRITE: memory is prefaulted without being touched")
    return Capability(False, "MADV_POPULATE_WRITE needs Linux 5.14; prefaulting touches every OS page")


def _cxl(root: Path, nodes: tuple[NumaNode, ...]) -> Capability:
    far = [node for node in nodes if not node.cpus and node.total_bytes]
    if far:
        texts = [f"node {node.number} ({format_bytes(node.total_bytes)})" for node in far]
        return Capability(True, f"memory without CPUs, possibly CXL: {', '.join(texts)}")
    devices = _names(root, "sys/bus/dax/devices", r"dax[\d.]+")
    advice = f"daxctl reconfigure-device --mode=system-ram {' '.join(devices) or 'DEVICE'}"
    found = "DAX memory is no NUMA node yet" if devices else "no NUMA node without CPUs, no DAX device"
    return Capability(False, f"{found}; {advice} makes one")


def _migration(root: Path) -> Capability:
    if has_capability(root, CAP_SYS_NICE):
        return Capability(True, "CAP_SYS_NICE: pages move between NUMA nodes under whoever has them mapped")
    return Capability(
        False, "only pages that no client has mapped move between NUMA nodes; the rest needs CAP_SYS_NICE "
        "(setcap cap_sys_nice+ep, or systemd's AmbientCapabilities=)"
    )  # fmt: skip


def _accelerator(root: Path) -> Capability:
    counts = {name: len(_names(root, "dev", pattern)) for name, pattern in
              (("NVIDIA", r"nvidia\d+"), ("Ascend", r"davinci\d+"), ("AMD (kfd)", r"kfd"))}  # fmt: skip
    if present := [f"{count} x {name}" for name, count in counts.items() if count]:
        return Capability(True, ", ".join(present))
    return Capability(False, "no /dev/nvidia*, /dev/davinci* or /dev/kfd; in a container pass the devices through")


def _segments(root: Path) -> Capability:
    """How many segments one process may hold: each takes a file descriptor and a mapping."""
    limit = re.search(r"^Max open files\s+(\S+)", _read(root, "proc/self/limits"), re.MULTILINE)
    files = int(limit[1]) if limit and limit[1].isdecimal() else 1 << 20
    maps = _number(root, "proc/sys/vm/max_map_count", 65530)
    text = f"{min(files, maps)} segments (open files {files}, vm.max_map_count {maps})"
    if min(files, maps) >= _SEGMENTS_WANTED:
        return Capability(True, text)
    advice = "ulimit -n or LimitNOFILE=" if files <= maps else "sysctl vm.max_map_count"
    return Capability(False, f"only {text}; raise {advice} to {_SEGMENTS_WANTED} or more")


def _read(root: Path, path: str) -> str:
    try:
        return (root / path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(root: Path, path: str, missing: int = 0) -> int:
    text = _read(root, path)
    return int(text) if re.fullmatch(r"-?\d+", text) else missing


def _names(root: Path, path: str, pattern: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(root / path) if re.fullmatch(pattern, name))
    except OSError:
        return []


def _selected(root: Path, path: str) -> str:
    """The bracketed word of `always [never] deny`."""
    match = re.search(r"\[(\w+)\]", _read(root, path))
    return match[1] if match else ""


def has_capability(root: Path, bit: int) -> bool:
    """Whether this process may do what a capability allows."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(root, "proc/self/status"), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> bit & 1)


def kernel_version(root: Path) -> tuple[int, int]:
    """(major, minor); (0, 0) where the kernel does not tell."""
    match = re.match(r"(\d+)\.(\d+)", _read(root, "proc/sys/kernel/osrelease"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _mounts(root: Path) -> list[tuple[str, str, str]]:
    """(mount point, file system, its options), in mount order; proc_pid_mountinfo(5)."""
    lines = (line.partition(" - ") for line in _read(root, "proc/self/mountinfo").splitlines())
    pairs = ((left.split(" "), right.split(" ")) for left, _, right in lines)
    return [(left[4], right[0], right[2]) for left, right in pairs if len(left) > 5 and len(right) > 2]


def _mount_at(point: str, root: Path) -> str | None:
    """Options of the tmpfs that is mounted at `point`."""
    found = [options for place, kind, options in _mounts(root) if place == point and kind == "tmpfs"]
    return found[-1] if found else None
