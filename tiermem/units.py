"""Bytes and seconds as text, at the edge only; inside, everything is bytes and seconds."""

from __future__ import annotations

import re

from tiermem.errors import ConfigError

_BYTES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_BYTES |= {f"{unit}iB": factor for unit, factor in list(_BYTES.items()) if len(unit) == 1 and unit != "B"}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str, example: str) -> float:
    match = _QUANTITY.fullmatch(text)
    factor = units.get(match[2]) if match else None
    if match is None or factor is None:
        raise ConfigError(f"{text!r} is not {what}; write for example {example}")
    return float(match[1]) * factor


def parse_bytes(text: str) -> int:
    """Bytes of `4GiB`, `512M` (binary) or `3.1GB` (decimal). Raises ConfigError."""
    return int(_parse(text, _BYTES, "a size", "4GiB, 512M or 3.1GB"))


def parse_seconds(text: str) -> float:
    """Seconds of `250ms`, `30s`, `5min`. Raises ConfigError."""
    return _parse(text, _SECONDS, "a duration", "250ms, 30s or 5min")


def format_bytes(count: float) -> str:
    """`4.0 GiB`; negative counts keep their sign."""
    size = abs(count)
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """`1.48 s`, `12.3 ms`, `840 us`, `90 ns`."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-6 or seconds == 0 else f"{seconds * 1e9:.0f} ns"


def format_rate(bytes_per_s: float) -> str:
    """`2.10 GB/s`: decimal, as disks and links are sold."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"
