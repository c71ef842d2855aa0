"""Backings: each kind that this host can have keeps the same promises, and refuses with what to do about it."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.conftest import CAP_SYS_ADMIN, FREE_HUGEPAGES, NR_HUGEPAGES, has_capability
from tiermem import _native, segment
from tiermem.errors import CapacityError, ConfigError, NativeError, Refused
from tiermem.segment import Backing, allocate, open_backing
from tiermem.types import PAGE_BYTES

CAPACITY = 4 * PAGE_BYTES

Opener = Callable[..., Backing]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens backings that are closed and removed at the end."""
    made: list[Backing] = []

    def open_(kind: str, directory: Path | None = None, capacity: int = CAPACITY) -> Backing:
        made.append(open_backing(kind, directory, capacity))
        return made[-1]

    yield open_
    # Whatever the test found broken, nothing of it stays on the host.
    for backing in made:
        backing.close(keep=True)
    while left := [mount for mount in segment._mounts("tmpfs") if tmp_path in mount.parents]:
        _native.tmpfs_unmount(str(left[0]))
    for backing in made:
        shutil.rmtree(backing.directory or tmp_path / "absent", ignore_errors=True)


@pytest.fixture(params=[
    pytest.param(("tmpfs", False), marks=pytest.mark.root), pytest.param(("tmpfs", True), marks=pytest.mark.root),
    pytest.param(("hugetlb", False), marks=pytest.mark.root), ("shm", True), ("memfd", False), ("memfd", True),
], ids=lambda param: f"{param[0]}-{'directory' if param[1] else 'none'}")  # fmt: skip
def backing(request: pytest.FixtureRequest, opened: Opener, tmp_path: Path) -> Backing:
    kind, with_directory = request.param
    if kind == "hugetlb":
        request.getfixturevalue("reserved")
    return opened(kind, tmp_path / "segments" if with_directory else None)


def filled(backing: Backing, key: str, byte: int, pages: int = 1) -> _native.Segment:
    made = backing.create(key, pages * PAGE_BYTES)
    made.prefault()
    np.frombuffer(made.buffer(), np.uint8)[:] = byte
    return made


# --- what every kind promises ------------------------------------------------------------------------------------


def test_a_sealed_segment_is_read_by_others_and_written_by_none(backing: Backing) -> None:
    made = filled(backing, "layer", 7, pages=2)
    made.seal()
    fd = made.share()
    try:
        with mmap.mmap(fd, 2 * PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            assert memory[0] == memory[-1] == 7
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 2 * PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"Errno"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match=r"Errno"):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    with pytest.raises(NativeError):
        made.prefault()


def test_evicting_gives_the_name_back_and_leaves_old_mappings_their_bytes(backing: Backing) -> None:
    made = filled(backing, "layer", 7)
    made.seal()
    fd = made.share()
    range_ = _native.Range.reserve(PAGE_BYTES)
    range_.map(0, fd, PAGE_BYTES)
    os.close(fd)
    array = np.frombuffer(range_.buffer(), np.uint8)
    made.close()
    backing.unlink("layer")
    backing.unlink("layer")
    assert backing.keys() == []
    again = filled(backing, "layer", 9)
    assert (array == 7).all()
    again.close()


def test_a_name_is_not_taken_twice(backing: Backing) -> None:
    filled(backing, "layer", 7)
    if backing._dirfd < 0:
        allocate(backing, "layer", PAGE_BYTES)  # anonymous memory: the name is a label
        return
    with pytest.raises(CapacityError, match=rf"segment layer of 2\.0 MiB could not be made on {backing.kind}.*exists"):
        allocate(backing, "layer", PAGE_BYTES)
    assert backing.adopt("layer", PAGE_BYTES).buffer()[0] == 7


def test_segments_outlive_their_pool_exactly_where_the_backing_says_so(
    backing: Backing, opened: Opener, tmp_path: Path
) -> None:
    filled(backing, "layer", 7).seal()
    filled(backing, "other", 8).seal()
    backing.close(keep=True)
    assert backing.survives == (backing.kind in ("tmpfs", "shm") and backing.directory is not None)
    if not backing.survives:
        return
    again = opened(backing.kind, tmp_path / "segments")
    assert again.keys() == ["layer", "other"]
    assert again.adopt("layer", PAGE_BYTES).buffer()[-1] == 7
    with pytest.raises(NativeError, match="load it again"):
        again.adopt("other", 2 * PAGE_BYTES)
    with pytest.raises(NativeError, match="No such file"):
        again.adopt("absent", PAGE_BYTES)
    again.close(keep=False)
    assert again.directory is not None
    assert not again.directory.exists()


def test_its_stock_is_of_the_same_memory(backing: Backing) -> None:
    stock = backing.stock()
    stock.fill(2 * PAGE_BYTES)
    assert stock.nbytes == 2 * PAGE_BYTES
    assert backing.keys() == []
    assert stock.take(PAGE_BYTES) == PAGE_BYTES
    stock.close()


# --- what each kind says and refuses ------------------------------------------------------------------------------


@pytest.mark.root
def test_a_tmpfs_takes_its_capacity_and_no_more(opened: Opener, tmp_path: Path) -> None:
    backing = opened("tmpfs", tmp_path / "segments", 3 * PAGE_BYTES)
    first = filled(backing, "first", 1, pages=3)
    second = allocate(backing, "second", 2 * PAGE_BYTES)
    with pytest.raises(NativeError, match="evict a model"):
        second.prefault()
    assert first.buffer()[-1] == 1
    larger = opened("tmpfs", tmp_path / "segments", 5 * PAGE_BYTES)
    second.prefault()
    assert os.statvfs(tmp_path / "segments").f_blocks * 4096 >= 5 * PAGE_BYTES
    larger.close(keep=True)


@pytest.mark.root
def test_a_detached_tmpfs_is_seen_by_nobody_and_goes_with_its_last_user(opened: Opener) -> None:
    def mounts() -> int:
        return Path("/proc/self/mountinfo").read_text().count(" tmpfs tiermem ")

    before = mounts()
    backing = opened("tmpfs")
    assert mounts() == before
    assert backing.directory is None
    assert not backing.survives


@pytest.mark.root
@pytest.mark.parametrize("name", ["plain", "with blank", "tab\tand\nline", "back\\slash \\040", "größe", "linked"])
def test_a_mount_is_found_again_whatever_its_name(opened: Opener, tmp_path: Path, name: str) -> None:
    """Missing it would mount a second file system over the segments of the first."""
    (tmp_path / name).mkdir()
    path = tmp_path / name / "segments"
    if name == "linked":
        (tmp_path / "link").symlink_to(tmp_path / name)
        path = tmp_path / "link" / "segments"
    filled(opened("tmpfs", path), "layer", 7).seal()
    again = opened("tmpfs", path)
    assert again.keys() == ["layer"]
    again.close(keep=False)
    assert not path.exists()


@pytest.mark.root
def test_hugetlb_keeps_within_what_is_reserved(reserved: int, opened: Opener) -> None:
    backing = opened("hugetlb", None, 8 * PAGE_BYTES)
    assert backing.kind == "hugetlb"
    assert not backing.survives
    made = filled(backing, "layer", 3, pages=4)
    assert int(FREE_HUGEPAGES.read_text()) == reserved - 4
    made.close()
    assert int(FREE_HUGEPAGES.read_text()) == reserved


@pytest.mark.root
def test_segments_on_a_hugetlbfs_are_there_after_a_restart(reserved: int, opened: Opener, tmp_path: Path) -> None:
    """What an earlier pool holds is no lack: the new one adopts it."""
    mount = tmp_path / "huge"
    mount.mkdir()
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(mount)], check=True)
    try:
        first = opened("hugetlb", tmp_path / "segments", reserved * PAGE_BYTES)
        assert str(mount) in first.reason
        filled(first, "layer", 3, pages=4).seal()
        first.close(keep=True)
        again = opened("hugetlb", tmp_path / "segments", reserved * PAGE_BYTES)
        assert again.adopt("layer", 4 * PAGE_BYTES).buffer()[-1] == 3
        again.close(keep=False)
        assert list(mount.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def test_hugetlb_that_is_not_reserved_says_what_to_write_where() -> None:
    pages = int(NR_HUGEPAGES.read_text()) - int(FREE_HUGEPAGES.read_text()) + (1 << 29)
    with pytest.raises(ConfigError, match=rf"1024\.0 TiB are needed; write {pages} to /proc/sys/vm/nr_hugepages"):
        open_backing("hugetlb", None, 1 << 50)


def test_shm_that_is_too_small_says_how_much_it_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shm: /dev/shm has .* free, 1024\.0 TiB are needed.*--backing"):
        open_backing("shm", tmp_path / "segments", 1 << 50)


def test_shm_counts_what_an_earlier_pool_left_as_room(
    opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened("shm", tmp_path / "segments")
    filled(first, "layer", 3, pages=3).seal()
    first.close(keep=True)
    full = SimpleNamespace(f_bavail=PAGE_BYTES // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(ConfigError, match=r"has 8\.0 MiB free, 10\.0 MiB are needed"):
        open_backing("shm", tmp_path / "segments", 5 * PAGE_BYTES)
    assert opened("shm", tmp_path / "segments", 4 * PAGE_BYTES).keys() == ["layer"]


def test_an_embedded_pool_leaves_nothing_in_shm() -> None:
    with pytest.raises(ConfigError, match="leaves no files in /dev/shm"):
        open_backing("shm", None, CAPACITY)


def test_an_unknown_kind_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="backing 'nvme' is unknown; choose auto, tmpfs, hugetlb, shm, memfd"):
        open_backing("nvme", None, CAPACITY)


def shm_home(directory: Path) -> Path:
    return Path("/dev/shm", segment._private_name(directory))


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    home = shm_home(tmp_path / "segments")
    home.mkdir()
    try:
        os.chown(home, 65534, 65534)
        with pytest.raises(Refused, match=r"belongs to another user; choose another state directory \(--state\)"):
            open_backing("shm", tmp_path / "segments", CAPACITY)
    finally:
        home.rmdir()


def test_a_link_in_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    """A pool removes files from its directory that it does not know."""
    (tmp_path / "precious").mkdir()
    home = shm_home(tmp_path / "segments")
    home.symlink_to(tmp_path / "precious")
    try:
        with pytest.raises(ConfigError, match="no backing for segments: shm: "):
            open_backing("shm", tmp_path / "segments", CAPACITY)
    finally:
        home.unlink()


# --- the choice ---------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_auto_takes_the_first_that_can_be_had(opened: Opener, tmp_path: Path) -> None:
    assert opened("auto").kind == "tmpfs"
    assert opened("auto", tmp_path / "segments").kind == "tmpfs"


@pytest.mark.parametrize(("with_directory", "kind"), [(True, "shm"), (False, "memfd")])
def test_auto_without_rights_takes_what_needs_none_and_says_why(
    tmp_path: Path, with_directory: bool, kind: str
) -> None:
    command = [sys.executable, "-c", UNPRIVILEGED, str(tmp_path / "segments") if with_directory else ""]
    if has_capability(CAP_SYS_ADMIN):
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("lacks setpriv, which drops CAP_SYS_ADMIN for one command")
        command = [setpriv, "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", *command]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert answer.startswith(f"{kind}: ")
    assert "not tmpfs: cannot m" in answer
    assert "CAP_SYS_ADMIN" in answer
    assert "not hugetlb: " in answer
    assert "/proc/sys/vm/nr_hugepages" in answer


UNPRIVILEGED = """
import sys
from pathlib import Path
from tiermem.segment import open_backing
backing = open_backing("auto", Path(sys.argv[1]) if sys.argv[1] else None, 1 << 30)
segment = backing.create("layer", 2 << 20)
segment.prefault()
segment.seal()
print(f"{backing.kind}: {backing.reason}")
segment.close()
backing.close(keep=False)
"""
