"""Performance monitoring units as the kernel describes them: /sys/bus/event_source/devices/NAME.

Owns reading a unit's directory and encoding its own terms into configuration words (Documentation/ABI/testing/
sysfs-bus-event_source-devices-format). Never opens an event, and knows no event by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tiermem.errors import ConfigError

_DEVICES = "sys/bus/event_source/devices"
_FIELD = re.compile(r"(config\d?):(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True)
class Pmu:
    """One unit. `type` is that of perf_event_attr; `cpus` are those that have it, None where all do."""

    name: str
    path: Path
    type: int
    cpus: tuple[int, ...] | None

    def cap(self, name: str, missing: int = 0) -> int:
        """A number in caps/."""
        text = read(self.path, f"caps/{name}")
        return int(text) if text.isdecimal() else missing

    def event(self, name: str) -> dict[str, int]:
        """The terms of one of its events; empty where it has none of that name."""
        return terms(read(self.path, f"events/{name}"))

    def has_term(self, name: str) -> bool:
        return (self.path / "format" / name).exists()

    def encode(self, values: Mapping[str, int]) -> dict[str, int]:
        """Configuration words by their names in perf_event_attr. Raises ConfigError for a term that it does not have,
        or whose value is too wide."""
        words: dict[str, int] = {}
        for term, value in values.items():
            word, bits = (term, range(64)) if re.fullmatch(r"config\d?", term) else self._field(term)
            if value >> len(bits):
                raise ConfigError(f"{value:#x} is too wide for term {term} of {self.name}, which has {len(bits)} bits")
            placed = sum((value >> index & 1) << bit for index, bit in enumerate(bits))
            words[word] = words.get(word, 0) | placed
        return words

    def _field(self, term: str) -> tuple[str, list[int]]:
        """The word of a term and its bits there, from the lowest bit of the value up."""
        match = _FIELD.fullmatch(read(self.path, f"format/{term}"))
        if match is None:
            raise ConfigError(f"unit {self.name} describes no term {term} in {self.path}/format")
        return match[1], numbers(match[2])


def unit(root: Path, name: str) -> Pmu | None:
    """The unit of that name, None where the kernel shows none. `root` holds sys/."""
    path = root / _DEVICES / name
    number = read(path, "type")
    if not number.isdecimal():
        return None
    cpus = read(path, "cpus") or read(path, "cpumask")
    return Pmu(name, path, int(number), tuple(numbers(cpus)) if cpus else None)


def units(root: Path, pattern: str) -> list[Pmu]:
    """Units whose whole name matches, by name."""
    try:
        names = sorted(path.name for path in (root / _DEVICES).iterdir() if re.fullmatch(pattern, path.name))
    except OSError:
        return []
    return [found for name in names if (found := unit(root, name)) is not None]


def online_cpus(root: Path) -> tuple[int, ...]:
    """CPUs that run; CPU 0 alone where the kernel does not tell."""
    return tuple(numbers(read(root, "sys/devices/system/cpu/online"))) or (0,)


def numbers(text: str) -> list[int]:
    """The numbers of `0-3,8`, which is how the kernel lists CPUs and bits. Raises ConfigError."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise ConfigError(f"{text!r} is no list of numbers such as 0-3,8")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def terms(text: str) -> dict[str, int]:
    """`event=0xcd,umask=0x1,ldlat=3` -> numbers; a term without a value is 1. Raises ConfigError."""
    pairs = [part.partition("=") for part in filter(None, text.split(","))]
    try:
        return {name.strip(): int(value, 0) if equals else 1 for name, equals, value in pairs}
    except ValueError:
        raise ConfigError(f"{text!r} is no event such as event=0xcd,umask=0x1") from None


def read(path: Path, name: str) -> str:
    """A file's text without its newline; empty where there is none."""
    try:
        return (path / name).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
