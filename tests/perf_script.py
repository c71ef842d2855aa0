"""What `perf` says of a perf.data file: every field of every sample, and the side-band. The oracle of the reader."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

PERF = shutil.which("perf")
needs_perf = pytest.mark.skipif(PERF is None, reason="lacks the program perf")

_MODES = {"K": 1, "U": 2, "H": 3, "G": 4, "g": 5}
_SIZES = {"K": 10, "M": 20, "G": 30}
_PATTERNS = {  # in the order in which perf prints them
    "comm": r"\s*(?P<comm>.*?)",
    "pid": r"(?P<pid>-?\d+)/(?P<tid>-?\d+)",
    "cpu": r"\[(?P<cpu>\d+)\]",
    "misc": r"(?P<misc>[KUHGg])[ESPD ]*",
    "time": r"(?P<s>\d+)\.(?P<ns>\d{9}):",
    "period": r"(?P<period>\d+)",
    "event": r"(?P<event>\S+):",
    "addr": r"(?P<addr>[0-9a-f]+)",
    "data_src": r"(?P<data_src>[0-9a-f]+) \|OP .*?\|BLK +\S+",
    "weight": r"(?P<weight>\d+)",
    "ins_lat": r"(?P<weight2>\d+)",
    "ip": r"(?P<ip>[0-9a-f]+)",
    "phys_addr": r"(?P<phys_addr>[0-9a-f]+)",
    "data_page_size": r"(?P<data_page_size>N/A|\d+[KMG]?)",
    "code_page_size": r"(?P<code_page_size>N/A|\d+[KMG]?)",
}
_NUMBERS = {"addr": 16, "data_src": 16, "ip": 16, "phys_addr": 16}


def perf(*arguments: str, stdin: Path | None = None) -> str:
    """Run perf and give what it prints; fails the test if perf fails."""
    with open(stdin or "/dev/null", "rb") as source:
        done = subprocess.run(
            [str(PERF), *arguments], stdin=source, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, f"perf {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def record_faults(path: Path) -> Path:
    """Every page fault of a Python that does nothing, in a new file; skips the test without the right to it."""
    program = [sys.executable, "-S", "-c", ""]
    command = [str(PERF), "record", "-q", "-d", "-e", "page-faults:u", "-c", "1", "-o", path, *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"lacks the right to perf record, sysctl kernel.perf_event_paranoid: {done.stderr.strip()[:200]}")
    return path


def samples(
    path: Path, fields: Sequence[str], *, pipe: bool = False, options: Sequence[str] = ()
) -> list[dict[str, object]]:
    """`perf script` of the file: one dict a sample, in its order; columns are named as those of SAMPLE."""
    asked = ",".join([*fields, *(["tid"] if "pid" in fields else [])])
    source = ("-i", "-") if pipe else ("-i", str(path))
    text = perf("script", "--ns", "-f", *source, *options, "-F", asked, stdin=path if pipe else None)
    line = re.compile(r"\s+".join(pattern for name, pattern in _PATTERNS.items() if name in fields) + r"\s*")
    return [_row(line, each) for each in text.splitlines() if each.strip()]


def _row(line: re.Pattern[str], text: str) -> dict[str, object]:
    match = line.fullmatch(text.strip())
    assert match, f"perf printed {text!r}, not {line.pattern}"
    row: dict[str, object] = {}
    found = match.groupdict()
    if "s" in found:
        row["time"] = int(found.pop("s")) * 10**9 + int(found.pop("ns"))
    for name, value in found.items():
        if name in ("comm", "event"):
            row[name] = value
        elif name == "misc":
            row[name] = _MODES[value]
        elif name.endswith("page_size"):
            row[name] = 0 if value == "N/A" else _size(value)
        else:
            row[name] = int(value, _NUMBERS.get(name, 10))
    return row


def _size(text: str) -> int:
    return int(text[:-1]) << _SIZES[text[-1]] if text[-1] in _SIZES else int(text)


_HEX = "(0x[0-9a-f]+|0)"
_MMAP = re.compile(rf"PERF_RECORD_MMAP2? (-?\d+)/-?\d+: \[{_HEX}\({_HEX}\) @ {_HEX}(?: [^\]]*)?\]: (\S+) (.*)")
_FORK = re.compile(r"PERF_RECORD_(FORK|EXIT)\((\d+):(\d+)\):\((\d+):(\d+)\)")


def sideband(path: Path) -> tuple[list[tuple[int, int, int, int, str, bool]], list[tuple[str, int, int, int, int]]]:
    """What perf tells, in its order: (pid, address, nbytes, offset, path, executable) of every mapping; (FORK or EXIT,
    pid, tid, parent pid, parent tid) of every thread's beginning and end."""
    text = perf("script", "-f", "-i", str(path), "--show-mmap-events", "--show-task-events", "-F", "comm")
    images, tasks = [], []
    for line in text.splitlines():
        if m := _MMAP.search(line):
            images.append((int(m[1]), int(m[2], 16), int(m[3], 16), int(m[4], 16), m[6].rstrip(), "x" in m[5]))
        elif m := _FORK.search(line):
            tasks.append((m[1], int(m[2]), int(m[3]), int(m[4]), int(m[5])))
    return images, tasks
