"""Symbols: which function an instruction address is in, from the files that processes mapped executable.

Reads symbol tables of ELF files (System V ABI, chapter 4), once per file, and trusts nothing of them. Names stay as the
linker has them: a C++ name stays mangled. Where there is no symbol the answer is `file+0xoffset`, never a failure.
"""

from __future__ import annotations

import bisect
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.samples import Samples

_SYMBOL = np.dtype([("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
                    ("size", "<u8")])  # fmt: skip
"""Elf64_Sym."""

_FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
_MAX_OFFSET = 1 << 63


class Mapped(Protocol):
    """A file that a process mapped executable: `nbytes` of it from `offset`, at `address`."""

    @property
    def pid(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def path(self) -> str: ...


class Function(NamedTuple):
    """A function and the file that it is in; `file` is empty where the address is in no mapping that is known."""

    name: str
    file: str


UNKNOWN = Function("unknown", "")


@dataclass(frozen=True, slots=True)
class _Table:
    """Functions of a file by file offset, ascending: [start, stop) is the one whose name begins at `strings[name]`."""

    start: npt.NDArray[np.uint64]
    stop: npt.NDArray[np.uint64]
    name: npt.NDArray[np.uint32]
    strings: bytes

    def find(self, offset: int) -> str | None:
        i = int(np.searchsorted(self.start, np.uint64(offset), side="right")) - 1
        if i < 0 or offset >= int(self.stop[i]):
            return None
        begin = int(self.name[i])
        return self.strings[begin : self.strings.find(b"\0", begin)].decode("utf-8", "replace")


@dataclass(slots=True)
class Symbols:
    """Functions of samples, given what was mapped. Of mappings of one process that overlap the later one counts.

    `notes` says of which files no symbols could be read, and why.
    """

    images: Iterable[Mapped]
    recorded_unix_s: float | None = None
    """When the images were mapped; a file that was modified after that is not used."""
    notes: list[str] = field(default_factory=list)
    _tables: dict[str, _Table | None] = field(default_factory=dict, repr=False)
    _by_pid: dict[int, tuple[list[int], list[Mapped]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        spans: dict[int, list[Mapped]] = {}
        for image in self.images:
            spans.setdefault(image.pid, []).append(image)
        for pid, images in spans.items():
            latest = {image.address: image for image in images}
            order = sorted(latest)
            self._by_pid[pid] = order, [latest[address] for address in order]

    def resolve(self, samples: Samples) -> tuple[npt.NDArray[np.intp], list[Function]]:
        """(index of its function for each sample, the functions), for the fields `ip` and `pid` of the dtype SAMPLE."""
        keys = np.empty(len(samples), [("pid", "<u4"), ("ip", "<u8")])
        keys["pid"], keys["ip"] = samples["pid"], samples["ip"]
        distinct, inverse = np.unique(keys, return_inverse=True)
        number: dict[Function, int] = {}
        found = [number.setdefault(self.function(int(pid), int(ip)), len(number)) for pid, ip in distinct]
        return np.array(found, np.intp)[inverse], list(number)

    def function(self, pid: int, ip: int) -> Function:
        """The function at one address of a process, else of the kernel."""
        for owner in (pid, -1):
            starts, images = self._by_pid.get(owner, ((), ()))
            i = bisect.bisect_right(starts, ip) - 1
            if i >= 0 and ip < images[i].address + images[i].nbytes:
                image = images[i]
                offset = ip - image.address + image.offset
                name = self._symbol(image.path, offset)
                return Function(name or f"{os.path.basename(image.path) or image.path}+{offset:#x}", image.path)
        return UNKNOWN

    def _symbol(self, path: str, offset: int) -> str | None:
        if path not in self._tables:
            self._tables[path] = self._load(path)
        table = self._tables[path]
        return table.find(offset) if table else None

    def _load(self, path: str) -> _Table | None:
        if not path.startswith("/"):
            return None  # [vdso], [kernel.kallsyms]: no files
        elf_file = _elf_reader()
        try:
            with open(path, "rb", opener=_open_now) as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise ValueError("it is no regular file")
                if self.recorded_unix_s is not None and facts.st_mtime > self.recorded_unix_s:
                    raise ValueError("it was modified since it was mapped")
                return _read_functions(elf_file, file)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            self.notes.append(f"{path}: no symbols: {why}")
            return None


def _elf_reader() -> Callable[[BinaryIO], Any]:
    try:
        from elftools.elf.elffile import ELFFile
    except ImportError:
        raise ConfigError("function names need pyelftools: pip install 'tiermem[report]'") from None
    reader: Callable[[BinaryIO], Any] = ELFFile
    return reader


def _open_now(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _read_functions(elf_file: Callable[[BinaryIO], Any], file: BinaryIO) -> _Table:
    """The functions of an ELF file. Raises ValueError for anything that is not one, or is damaged."""
    try:
        elf = elf_file(file)
        if elf.elfclass != 64 or not elf.little_endian:
            raise ValueError("a 64-bit little-endian file is needed")
        loads = [
            (segment["p_vaddr"], segment["p_filesz"], segment["p_offset"]) for segment in elf.iter_segments("PT_LOAD")
        ]
        for name in (".symtab", ".dynsym"):
            section = elf.get_section_by_name(name)
            if section is not None:
                table = _functions(
                    _bytes_of(file, section), _bytes_of(file, elf.get_section(section["sh_link"])), loads
                )
                if len(table.start):
                    return table
    except Exception as error:  # pyelftools raises what it likes on damaged files
        raise ValueError(f"it is no whole ELF file: {error or type(error).__name__}") from None
    raise ValueError("it is stripped")


def _bytes_of(file: BinaryIO, section: Any) -> bytes:
    offset, size = section["sh_offset"], section["sh_size"]
    if offset + size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"a section of {size} bytes at {offset} lies beyond its end")
    file.seek(offset)
    return file.read(size)


def _functions(symbols: bytes, strings: bytes, loads: list[tuple[int, int, int]]) -> _Table:
    """The functions among the symbols of one table, by where `loads` (address, bytes, file offset) put them.

    Of several names of one address the one that a program would call it by is kept: global before weak before local,
    without a leading underscore before with one.
    """
    rows = np.frombuffer(symbols, _SYMBOL, len(symbols) // _SYMBOL.itemsize)
    rows = rows[np.isin(rows["info"] & 0xF, _FUNCTIONS) & (rows["section"] != 0) & (rows["name"] < len(strings))]
    offset = np.zeros(len(rows), np.uint64)
    inside = np.zeros(len(rows), np.bool_)
    for address, nbytes, at in loads:
        here = rows["value"] - np.uint64(address) < np.uint64(nbytes)  # unsigned: what lies before wraps around
        offset[here] = rows["value"][here] - np.uint64(address) + np.uint64(at)
        inside |= here
    rows, offset = rows[inside], offset[inside]
    underscore = np.frombuffer(strings, np.uint8)[rows["name"]] == ord("_")
    rank = np.where(rows["info"] >> 4 == 0, 3, rows["info"] >> 4)  # binding: 1 global, 2 weak, 0 local
    order = np.lexsort((underscore, rank, offset))
    _, first = np.unique(offset[order], return_index=True)
    rows, start = rows[order][first], offset[order][first]
    following = np.append(start[1:], np.uint64(_MAX_OFFSET))
    # Assembly often gives no size; such a function reaches to the next one, but not beyond an OS page.
    size = np.where(rows["size"] > 0, rows["size"], np.uint64(4096))
    stop = start + np.minimum(size, following - start)
    return _Table(start, stop, rows["name"].copy(), strings)
