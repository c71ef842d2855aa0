"""Option kinds: what the value of an option is, and how text or a typed value becomes it. Knows no option by name.

Whatever reads a value raises ValueError with what is wrong; the table adds which option, from where, and an example.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiermem.peer.address import Address, parse_address
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes, parse_bytes, parse_seconds


@dataclass(frozen=True, slots=True)
class Kind:
    """What an option's value is. `read` turns text, or a typed value of a file or a caller, into it or raises
    ValueError with what is wrong; `unit` is that of the number it returns. `many`: the flag may be repeated."""

    noun: str
    example: str
    read: Callable[[object], object]
    unit: str | None = None
    many: bool = False


def as_text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it must be text and not empty")
    return value


def as_path(value: object) -> Path:
    text = os.fspath(value) if isinstance(value, os.PathLike) else as_text(value)
    return Path(os.path.abspath(os.path.expanduser(text)))


def as_address(value: object) -> str:
    text = as_text(value)
    place, _, tail = text.rpartition(":")
    if text.startswith("unix:/") or (place and place != "unix" and tail.isdecimal() and 0 < int(tail) < 1 << 16):
        return text
    raise ValueError("it must be unix: with an absolute path, or HOST:PORT")


def _quantity(value: object, parse: Callable[[str], float], noun: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    try:
        return parse(as_text(value))
    except ValueError:
        raise ValueError(f"it must be {noun}") from None


def size(example: str, low: int, high: int = 1 << 60, step: int = PAGE_BYTES) -> Kind:
    """Bytes from `low` to `high`, rounded down to whole `step`s: `3.1GB` is no whole number of pages."""

    def read(value: object) -> int:
        size = int(_quantity(value, parse_bytes, "a size"))
        if not low <= size <= high:
            raise ValueError(f"it must be from {format_bytes(low)} to {format_bytes(high)}")
        return size - size % step

    return Kind("SIZE", example, read, "bytes")


def count(low: int, high: int) -> Kind:
    def read(value: object) -> int:
        count = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if not isinstance(count, int) or isinstance(count, bool) or not low <= count <= high:
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return count

    return Kind("COUNT", str(low), read)


def as_seconds(value: object) -> float:
    seconds = _quantity(value, parse_seconds, "a duration")
    if not 0 <= seconds < float("inf"):
        raise ValueError("it must be finite and not negative")
    return float(seconds)


def as_switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError("it must be true or false")
    return known[value.lower()]


def choice(*names: str) -> Kind:
    def read(value: object) -> str:
        if value not in names:
            raise ValueError(f"it must be one of {', '.join(names)}")
        return str(value)

    return Kind("|".join(names), names[0], read)


def as_epoch(value: object) -> float:
    seconds = as_seconds(value)
    if not 0.01 <= seconds <= 60:
        raise ValueError("it must be from 10ms to 60s")
    return seconds


def as_share(value: object) -> float:
    text = value.strip() if isinstance(value, str) else value
    scale = 1.0
    if isinstance(text, str) and text.endswith("%"):
        text, scale = text.removesuffix("%"), 0.01
    try:
        share = float(text) * scale if isinstance(text, str | int | float) else float("nan")
    except ValueError:
        share = float("nan")
    if not 0 < share <= 1 or isinstance(value, bool):
        raise ValueError("it must be a share, above 0% and up to 100%")
    return share


def as_listener(value: object) -> str:
    """`` (none), PORT on the loopback, or HOST:PORT."""
    text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else "?"
    host_name, _, port = text.rpartition(":")
    if text and not (port.isdecimal() and int(port) < 1 << 16):
        raise ValueError("it must be a port, or HOST:PORT")
    return f"{host_name or '127.0.0.1'}:{port}" if text else ""


def as_file(value: object) -> Path | None:
    """Empty: none."""
    return as_path(value) if value else None


def as_pool(value: object) -> Address | None:
    """Another host's pool, or where this one listens for those; empty: none."""
    return value if isinstance(value, Address) else parse_address(as_text(value)) if value else None


def pools(flag: str) -> Kind:
    def read(value: object) -> tuple[Address, ...]:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, Sequence) or isinstance(parts, bytes):
            raise ValueError("it must be HOST:PORT, or a list of such")
        for part in parts:
            if isinstance(part, str) and "," in part:
                each = " ".join(f"{flag} {pool.strip()}" for pool in part.split(","))
                raise ValueError(f"{part!r} is more than one pool; write {each}, or a list in a file")
        found = tuple(pool for part in parts if (pool := as_pool(part)) is not None)
        if any(not pool.port for pool in found):
            raise ValueError("a pool that is called has a port above 0")
        return found

    return Kind("HOST:PORT", "pool-b:7070", read, many=True)


DIRECTORY = Kind("DIRECTORY", "/var/lib/tiermem", as_path)
FILE = Kind("FILE", "/etc/tiermem/pool.pem", as_file)
SWITCH = Kind("SWITCH", "true", as_switch)
