"""The door to the native core: errors, lifetimes of mapped memory, and reading through it."""

from __future__ import annotations

import errno
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tiermem import _native
from tiermem.errors import Closed, NativeError
from tiermem.types import PAGE_BYTES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def dirfd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def shared() -> Iterator[int]:
    """A descriptor of a segment of one page that is full of sevens."""
    segment = _native.Segment.create(-1, "sevens", PAGE_BYTES)
    np.frombuffer(segment.buffer(), np.uint8)[:] = 7
    segment.seal()
    fd = segment.share()
    segment.close()
    yield fd
    os.close(fd)


def is_mapped(address: int) -> bool:
    """Whether a file or anonymous memory with access rights is at `address` of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return "r" in line.split()[1]
    return False


def test_constants_agree_with_the_vocabulary() -> None:
    assert _native.PAGE_BYTES == PAGE_BYTES
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert _native.version() == project["version"]


def test_header_constants_are_left_to_the_compiler() -> None:
    header = (ROOT / "native" / "include" / "tiermem.h").read_text()
    values = {name: int(value, 0) for name, value in re.findall(r"#define (TM_\w+) \(?(-?\d\w*)\)?", header)}
    assert {name: getattr(_native.lib, name) for name in values} == values


def test_error_says_what_failed_and_what_to_do(dirfd: int, tmp_path: Path) -> None:
    with pytest.raises(NativeError, match=r"cannot open segment absent of 2097152 bytes: No such file") as caught:
        _native.Segment.open(dirfd, "absent", PAGE_BYTES)
    assert caught.value.errno == errno.ENOENT
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(NativeError, match="load it again") as caught:
        _native.Segment.open(dirfd, "short", PAGE_BYTES)
    assert caught.value.errno == _native.E_SHORT


def test_segment_is_written_sealed_and_found_again(dirfd: int) -> None:
    segment = _native.Segment.create(dirfd, "layer", 2 * PAGE_BYTES)
    segment.prefault(threads=2)
    with segment.buffer() as memory:
        assert memory.nbytes == segment.nbytes == 2 * PAGE_BYTES
        memory[-3:] = b"end"
    segment.seal()
    assert segment.sealed
    assert segment.buffer().readonly
    with pytest.raises(NativeError) as caught:
        segment.prefault(0, 1)
    assert caught.value.errno == _native.E_SEALED
    segment.close()

    found = _native.Segment.open(dirfd, "layer", 2 * PAGE_BYTES)
    assert found.sealed
    assert found.buffer()[-3:] == b"end"
    with pytest.raises(TypeError):
        found.buffer()[0] = b"x"


def test_shared_descriptor_cannot_write(shared: int) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(shared, b"x")
    assert not os.get_inheritable(shared)


def test_segment_is_unmapped_with_its_last_array() -> None:
    segment = _native.Segment.create(-1, "s", PAGE_BYTES)
    address = segment.address
    array = np.frombuffer(segment.buffer(), np.uint8)
    row = array[100:200]
    segment.close()
    del array, segment
    row[:] = 5
    assert is_mapped(address)
    del row
    assert not is_mapped(address)


def test_arrays_outlive_their_range(shared: int) -> None:
    space = _native.Range.reserve(PAGE_BYTES)
    space.map(0, shared, PAGE_BYTES)
    address = space.address
    assert address % PAGE_BYTES == 0
    array = np.frombuffer(space.buffer(), np.uint8)[PAGE_BYTES // 2 :]
    assert not array.flags.writeable
    space.close()
    del space
    assert array.sum(dtype=np.int64) == 7 * PAGE_BYTES // 2
    del array
    assert not is_mapped(address)


def test_copy_on_write_stays_private(shared: int) -> None:
    space = _native.Range.reserve(2 * PAGE_BYTES, _native.Access.COW)
    space.map(PAGE_BYTES, shared, PAGE_BYTES)
    array = np.frombuffer(space.buffer(), np.uint8)[PAGE_BYTES:]
    array[0] = 9
    assert array[0] == 9
    assert os.pread(shared, 1, 0) == b"\x07"


def test_range_refuses_what_does_not_fit(shared: int) -> None:
    space = _native.Range.reserve(PAGE_BYTES)
    with pytest.raises(NativeError, match="cannot map 2097152 bytes at 2097152 of a range of 2097152"):
        space.map(PAGE_BYTES, shared, PAGE_BYTES)


def test_stock_gives_what_it_has() -> None:
    stock = _native.Stock(-1)
    assert stock.fill(3 * PAGE_BYTES - 1, threads=2) > 0
    assert stock.nbytes == 3 * PAGE_BYTES
    assert stock.take(PAGE_BYTES) == PAGE_BYTES
    assert stock.take(9 * PAGE_BYTES) == 2 * PAGE_BYTES
    assert stock.nbytes == 0


def test_reader_scatters_a_cold_file(tmp_path: Path) -> None:
    content = np.random.default_rng(3).bytes(300_001)
    path = tmp_path / "weights"
    path.write_bytes(content)
    reader, staging = _native.Reader(str(path)), _native.Staging(512 << 10)
    assert os.fstat(reader.fd).st_size == len(content)
    os.fdatasync(reader.fd)
    os.posix_fadvise(reader.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    target = bytearray(len(content))
    base = np.frombuffer(target, np.uint8).ctypes.data
    spans = [(3, 5000), (5003, 70_000), (200_000, 100_001)]
    reader.read([(offset, length, base + offset) for offset, length in spans], staging)
    for offset, length in spans:
        assert target[offset : offset + length] == content[offset : offset + length]
    assert not any(target[75_003:200_000])

    with pytest.raises(NativeError, match=r"cannot read bytes 300000 to 300002 of .*weights") as caught:
        reader.read([(300_000, 2, base)], staging)
    assert caught.value.errno == _native.E_SHORT
    reader.read([], staging)


def test_reader_counts_cached_bytes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(100_000))
    reader = _native.Reader(str(path))
    try:
        assert reader.cached(10, 99_990) == 99_990
    except NativeError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip(f"no cachestat here: {error}")


def test_reader_takes_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        with pytest.raises(NativeError, match="Invalid argument"):
            _native.Reader(str(path))


def test_paths_with_null_characters_are_refused(dirfd: int, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(NativeError, match="null character"):
        _native.Reader(f"{tmp_path}/a\0b")
    with pytest.raises(NativeError, match="null character"):
        _native.Segment.open(dirfd, "a\0b", PAGE_BYTES)


def test_copy_moves_every_byte() -> None:
    source = np.random.default_rng(1).integers(0, 256, 9_000_001, np.uint8)
    target = np.zeros_like(source)
    _native.copy(target.ctypes.data, source.ctypes.data, source.nbytes, threads=4)
    assert np.array_equal(source, target)


@pytest.mark.parametrize(
    ("make", "uses"),
    [
        (lambda: _native.Segment.create(-1, "s", PAGE_BYTES), ("buffer", "prefault", "seal", "share")),
        (lambda: _native.Range.reserve(PAGE_BYTES), ("buffer",)),
        (lambda: _native.Stock(-1), ()),
        (lambda: _native.Reader(__file__), ()),
        (lambda: _native.Staging(1), ()),
    ],
    ids=["segment", "range", "stock", "reader", "staging"],
)
def test_closed_wrappers_refuse_every_use(make: Callable[[], _native.Segment], uses: tuple[str, ...]) -> None:
    wrapper = make()
    assert not wrapper.closed
    wrapper.close()
    wrapper.close()
    assert wrapper.closed
    for use in uses:
        with pytest.raises(Closed, match="is closed"):
            getattr(wrapper, use)()


def test_every_property_of_a_closed_wrapper_raises() -> None:
    segment, space = _native.Segment.create(-1, "s", PAGE_BYTES), _native.Range.reserve(PAGE_BYTES)
    stock, reader, staging = _native.Stock(-1), _native.Reader(__file__), _native.Staging(PAGE_BYTES)
    second = _native.Reader(__file__)
    for wrapper in (segment, space, stock, reader, staging):
        wrapper.close()
    uses: list[Callable[[], object]] = [
        lambda: segment.address,
        lambda: space.address,
        lambda: space.map(0, 0, 1),
        lambda: stock.nbytes,
        lambda: stock.fill(1),
        lambda: stock.take(1),
        lambda: reader.fd,
        lambda: reader.is_direct,
        lambda: reader.cached(0, 1),
        lambda: reader.read([], staging),
        lambda: second.read([], staging),
    ]
    for use in uses:
        with pytest.raises(Closed):
            use()


def test_closing_under_a_running_call_is_safe() -> None:
    stock = _native.Stock(-1)
    filler = threading.Thread(target=stock.fill, args=(64 * PAGE_BYTES,))
    filler.start()
    stock.close()
    filler.join()


@pytest.mark.root
def test_detached_tmpfs_holds_segments_and_reports_when_full() -> None:
    try:
        fd = _native.tmpfs_detached(2 * PAGE_BYTES)
    except NativeError as error:
        if error.errno != errno.EPERM:
            raise
        pytest.skip(str(error))
    try:
        _native.Segment.create(fd, "fits", PAGE_BYTES).prefault()
        with pytest.raises(NativeError, match="evict a model or give the tier more capacity"):
            _native.Segment.create(fd, "large", 2 * PAGE_BYTES).prefault()
    finally:
        os.close(fd)


@pytest.mark.root
def test_mounted_tmpfs_is_resized_and_unmounted(tmp_path: Path) -> None:
    try:
        _native.tmpfs_mount(str(tmp_path), 2 * PAGE_BYTES)
    except NativeError as error:
        if error.errno != errno.EPERM:
            raise
        pytest.skip(str(error))
    try:
        _native.tmpfs_resize(str(tmp_path), 4 * PAGE_BYTES)
        space = os.statvfs(tmp_path)
        assert space.f_blocks * space.f_frsize == 4 * PAGE_BYTES
        (tmp_path / "large").write_bytes(bytes(3 * PAGE_BYTES))
        with pytest.raises(NativeError, match="less than it holds"):
            _native.tmpfs_resize(str(tmp_path), PAGE_BYTES)
    finally:
        _native.tmpfs_unmount(str(tmp_path))
    assert not os.path.ismount(tmp_path)
