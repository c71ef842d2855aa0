"""Facts of a host, read from trees that a test builds."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiermem import host

GIB = 1 << 30
Build = Callable[[dict[str, str]], Path]

LAPTOP = {
    "proc/sys/kernel/osrelease": "6.1.0-18-amd64\n",
    "proc/sys/kernel/hostname": "lap\n",
    "proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n",
    "proc/self/status": "Name:\tx\nCapEff:\t0000000000000000\n",
    "proc/self/limits": "Max open files            1024                 524288               files\n",
    "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda rw\n25 24 0:23 / /dev/shm rw shared:4 - tmpfs tmpfs rw\n",
    "proc/sys/vm/max_map_count": "65530\n",
    "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always within_size advise [never] deny force\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "0\n",
    "sys/devices/system/node/node0/cpulist": "0-7\n",
    "sys/devices/system/node/node0/meminfo": f"Node 0 MemTotal: {16 << 20} kB\nNode 0 MemFree: 4 kB\n",
}
ROOT_STATUS = {"proc/self/status": "CapEff:\t000001ffffffffff\n"}
RESERVED = {
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "1024\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "512\n",
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds the laptop's tree with some files replaced; returns its root. Its /dev/shm has room for 12 GiB."""
    room = {tmp_path / "dev/shm": SimpleNamespace(f_bavail=12 << 18, f_frsize=4096)}
    monkeypatch.setattr("os.statvfs", room.__getitem__)

    def tree(changes: dict[str, str]) -> Path:
        for name, text in (LAPTOP | changes).items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return tree


def test_a_laptop(build: Build) -> None:
    facts = host.probe(build({}))
    assert (facts.name, facts.kernel) == ("lap", "6.1.0-18-amd64")
    assert facts.memory == host.Memory(16 * GIB, 8 * GIB, None)
    assert facts.nodes == (host.NumaNode(0, "0-7", 16 * GIB, 4096),)
    assert {name for name, check in facts.capabilities().items() if check.available} == {"shm", "memfd", "populate"}
    assert "CAP_SYS_ADMIN" in facts.tmpfs.reason
    assert "vm.nr_hugepages" in facts.hugetlb.reason
    assert "daxctl reconfigure-device --mode=system-ram" in facts.cxl.reason
    assert "only 1024 segments" in facts.segments.reason
    assert "ulimit -n" in facts.segments.reason


def test_an_empty_tree_raises_nothing_and_explains_everything(tmp_path: Path) -> None:
    facts = host.probe(tmp_path)
    assert facts.memory == host.Memory(0, 0, None)
    assert facts.nodes == ()
    assert all(check.reason for check in facts.capabilities().values())
    assert host.storage(tmp_path, tmp_path).filesystem == "unknown"


def test_garbage_raises_nothing(build: Build) -> None:
    facts = host.probe(build(dict.fromkeys(LAPTOP, "\x00 not - what [it] was: -7 kB\n")))
    assert facts.memory.total_bytes == 0


def test_probing_this_host_agrees_with_the_kernel() -> None:
    facts = host.probe()
    assert facts.memory.total_bytes > facts.memory.available_bytes > 0
    assert facts.kernel == Path("/proc/sys/kernel/osrelease").read_text().strip()


def test_the_tightest_control_group_limits_memory(build: Build) -> None:
    root = build({
        "proc/self/cgroup": "0::/system.slice/pool.service\n",
        "sys/fs/cgroup/system.slice/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/system.slice/pool.service/memory.max": f"{6 * GIB}\n",
        "sys/fs/cgroup/memory.max": "max\n",
    })  # fmt: skip
    assert host.memory(root).usable_bytes == 4 * GIB


def test_memory_without_cpus_may_be_cxl(build: Build) -> None:
    far = {"cpulist": "\n", "meminfo": f"Node 10 MemTotal: {64 << 20} kB\nNode 10 MemFree: {60 << 20} kB\n"}
    facts = host.probe(build({f"sys/devices/system/node/node10/{name}": text for name, text in far.items()}))
    assert [node.number for node in facts.nodes] == [0, 10]
    assert facts.cxl == host.Capability(True, "memory without CPUs, possibly CXL: node 10 (64.0 GiB)")


def test_pages_of_others_move_with_cap_sys_nice_alone(build: Build) -> None:
    assert "setcap cap_sys_nice+ep" in host.probe(build({})).migration.reason
    allowed = host.probe(build({"proc/self/status": f"CapEff:\t{1 << 23:016x}\n"}))
    assert (allowed.migration.available, allowed.tmpfs.available) == (True, False)


def test_nodes_with_memory_are_told_as_the_kernel_has_them(build: Build, tmp_path: Path) -> None:
    assert host.nodes_with_memory(tmp_path / "nowhere") == ""
    assert host.nodes_with_memory(build({"sys/devices/system/node/has_memory": "0,2-3\n"})) == "0,2-3"


def test_a_dax_device_is_named_in_the_advice(build: Build) -> None:
    facts = host.probe(build({"sys/bus/dax/devices/dax0.0/size": "1\n"}))
    assert "--mode=system-ram dax0.0" in facts.cxl.reason


def test_devices_are_counted(build: Build) -> None:
    names = ("dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/davinci3", "dev/davinci_manager")
    facts = host.probe(build(dict.fromkeys(names, "") | {"sys/class/infiniband/mlx5_0/node_type": "1"}))
    assert facts.accelerator == host.Capability(True, "2 x NVIDIA, 1 x Ascend")
    assert facts.rdma == host.Capability(True, "mlx5_0")


def test_memory_is_pinned_within_the_limit(build: Build) -> None:
    def limited(nbytes: int | str) -> host.Capability:
        return host.memlock(build({"proc/self/limits": f"Max locked memory         {nbytes}   {nbytes}    bytes\n"}))

    assert "only 8.0 MiB may be pinned" in limited(8 << 20).reason
    assert "LimitMEMLOCK=" in limited(8 << 20).reason
    assert [limited(n).available for n in (8 << 20, 8 * GIB, "unlimited", 0)] == [False, True, True, False]
    assert host.memlock(build(ROOT_STATUS)).available, "CAP_IPC_LOCK"


def test_storage_is_of_the_deepest_and_latest_mount(build: Build, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    mounts = (("/", "ext4"), (models, "xfs"), (models, "nfs4"), (f"{models}2", "btrfs"))
    lines = [f"22 1 8:1 / {point} rw - {kind} /dev/sda rw" for point, kind in mounts]
    root = build({"proc/self/mountinfo": "\n".join(lines)})
    disk = host.storage(models, root)
    assert (disk.filesystem, disk.mount_point) == ("nfs4", str(models))
    assert "holds a checkpoint" in disk.direct.reason
    assert host.storage(models / "absent", root).direct.reason.endswith("No such file or directory")
    (models / "a.safetensors").write_bytes(b"x")
    assert "O_DIRECT" in host.storage(models, root).direct.reason
