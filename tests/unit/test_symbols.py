"""Symbols: the functions of real files, and a fallback for everything else."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tiermem.errors import ConfigError
from tiermem.samples import SAMPLE
from tiermem.symbols import UNKNOWN, Function, Symbols

pytest.importorskip("elftools", reason="lacks pyelftools, which reads ELF files: pip install 'tiermem[report]'")


class Image(NamedTuple):
    pid: int
    address: int
    nbytes: int
    offset: int
    path: str


def own_images() -> list[Image]:
    """Executable mappings of this process."""
    images = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights, offset, _, _, *path = line.split(maxsplit=5)
        if "x" in rights and path:
            start, stop = (int(number, 16) for number in span.split("-"))
            images.append(Image(os.getpid(), start, stop - start, int(offset, 16), path[0]))
    return images


def elf(symbols: list[tuple[str, int, int, int]], vaddr: int = 0x400000, offset: int = 0x1000) -> bytes:
    """A 64-bit ELF file with one PT_LOAD of 0x2000 bytes and a .symtab of (name, st_info, address, size)."""
    strings, table = b"\0", bytes(24)
    for name, info, address, size in symbols:
        table += struct.pack("<IBBHQQ", len(strings), info, 0, 1, address, size)
        strings += name.encode() + b"\0"
    names = b"\0.symtab\0.strtab\0.shstrtab\0"
    at = [offset + 0x2000]
    for part in (table, strings, names):
        at.append(at[-1] + len(part))
    sections = bytes(64)
    for name, kind, i, link, entry in ((1, 2, 0, 2, 24), (9, 3, 1, 0, 0), (17, 3, 2, 0, 0)):
        sections += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, at[i], at[i + 1] - at[i], link, 0, 1, entry)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, at[3], 0, 64, 56, 1, 64, 4, 3)
    load = struct.pack("<IIQQQQQQ", 1, 5, offset, vaddr, vaddr, 0x2000, 0x2000, 0x1000)
    return (header + load).ljust(at[0], b"\0") + table + strings + names + sections


def test_the_functions_of_this_process() -> None:
    symbols = Symbols(own_images())
    for name in ("malloc", "qsort", "getpid"):
        address = ctypes.cast(getattr(ctypes.CDLL("libc.so.6"), name), ctypes.c_void_p).value or 0
        found = symbols.function(os.getpid(), address + 1)
        assert name in found.name.lstrip("_")
        assert os.path.exists(found.file)


def test_addresses_between_the_functions_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prog"
    rows = [
        ("weak", 0x22, 0x400010, 0x10),
        ("_alias", 0x12, 0x400010, 0x10),
        ("first", 0x12, 0x400010, 0x10),
        ("sizeless", 0x12, 0x400030, 0),
        ("last", 0x02, 0x401FF0, 0x10),
        ("object", 0x11, 0x400050, 0x10),
        ("outside", 0x12, 0x500000, 0x10),
    ]
    path.write_bytes(elf(rows))
    # The loader put file offset 0x1000, which was linked for 0x400000, at 0x7000.
    symbols = Symbols([Image(1, 0x7000, 0x2000, 0x1000, str(path))])
    names = {address: symbols.function(1, address).name for address in
             (0x7000, 0x7010, 0x701F, 0x7020, 0x7030, 0x7050, 0x8FF0, 0x8FFF, 0x9000)}  # fmt: skip
    assert names == {
        0x7000: "prog+0x1000", 0x7010: "first", 0x701F: "first", 0x7020: "prog+0x1020", 0x7030: "sizeless",
        0x7050: "sizeless", 0x8FF0: "last", 0x8FFF: "last", 0x9000: "unknown",
    }  # fmt: skip
    assert symbols.notes == []


def test_samples_are_resolved_each_to_its_function(tmp_path: Path) -> None:
    path = tmp_path / "prog"
    path.write_bytes(elf([("f", 2, 0x400000, 16), ("g", 2, 0x400010, 16)]))
    images = [Image(1, 0x7000, 0x2000, 0x1000, str(path)), Image(2, 0x9000, 0x2000, 0x1000, str(path)),
              Image(-1, 1 << 63, 0x1000, 0, "[kernel.kallsyms]_text")]  # fmt: skip
    samples = np.zeros(5, SAMPLE)
    samples["pid"] = [1, 2, 1, 3, 1]
    samples["ip"] = [0x7010, 0x9000, 0x7011, 0x7010, (1 << 63) + 5]
    index, functions = Symbols(images).resolve(samples)
    assert [functions[i] for i in index.tolist()] == [
        Function("g", str(path)), Function("f", str(path)), Function("g", str(path)), UNKNOWN,
        Function("[kernel.kallsyms]_text+0x5", "[kernel.kallsyms]_text"),
    ]  # fmt: skip
    empty, none = Symbols(images).resolve(samples[:0])
    assert (len(empty), none) == (0, [])


def test_files_without_symbols_are_named_once(tmp_path: Path) -> None:
    text, changed, stripped = tmp_path / "text", tmp_path / "changed", tmp_path / "stripped"
    text.write_text("#!/bin/sh\n")
    changed.write_bytes(elf([("f", 2, 0x400000, 16)]))
    stripped.write_bytes(elf([]))
    os.utime(changed, (3e9, 3e9))
    os.mkfifo(tmp_path / "pipe")
    names = ["missing", "text", "changed", "stripped", "pipe", "."]
    images = [Image(1, 0x1000 * i, 0x1000, 0, f"{tmp_path}/{name}") for i, name in enumerate(names)]
    symbols = Symbols(images, recorded_unix_s=2e9)
    for _ in range(2):
        for i, name in enumerate(names):
            assert symbols.function(1, 0x1000 * i + 4).name == f"{os.path.basename(name)}+0x4"
    reasons = [note.removeprefix(f"{tmp_path}/") for note in symbols.notes]
    assert [reason.split(" (")[0] for reason in reasons] == [
        "missing: no symbols: No such file or directory",
        "text: no symbols: it is no whole ELF file: Magic number does not match",
        "changed: no symbols: it was modified since it was mapped",
        "stripped: no symbols: it is stripped",
        "pipe: no symbols: it is no regular file",
        ".: no symbols: Is a directory",
    ]


def test_damaged_files_fall_back(tmp_path: Path) -> None:
    """Every byte of the headers and tables set to its extremes, and every length."""
    path, whole = tmp_path / "prog", elf([("f", 2, 0x400000, 16), ("g", 2, 0x400010, 16)])
    places = [*range(0, 120), *range(0x3000, len(whole))]
    for place in places[::3]:
        for value in (0, 0xFF):
            damaged = bytearray(whole)
            damaged[place] = value
            path.write_bytes(damaged)
            found = Symbols([Image(1, 0x7000, 0x2000, 0x1000, str(path))]).function(1, 0x7000)
            assert found.file == str(path)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert Symbols([Image(1, 0x7000, 0x2000, 0x1000, str(path))]).function(1, 0x7000).name.startswith("prog+0x")


def test_a_missing_library_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elftools.elf.elffile", None)
    with pytest.raises(ConfigError, match=r"pip install 'tiermem\[report\]'"):
        Symbols([Image(1, 0, 1 << 20, 0, shutil.which("true") or sys.executable)]).function(1, 5)
