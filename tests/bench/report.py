"""The report: rows as tables on stdout, and everything that was measured as one JSON file. Judges nothing."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.figures import Row, Unit
from tests.bench.launch import REPOSITORY
from tests.bench.loaders import LOADERS
from tiermem.bench.samples import LARGE_SPREAD
from tiermem.units import format_bytes, format_rate, format_seconds

SCHEMA = "tiermem.benchmark/1"

_FORMATS: dict[Unit, Callable[[float], str]] = {
    "s": format_seconds,
    "B": format_bytes,
    "B/s": format_rate,
    "x": lambda value: f"{value:.2f} x",
}


def show(title: str, rows: Sequence[Row]) -> None:
    """One case as a table."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in ("", "median", "min", "max", "n", "target", "of target", ""):
        grid.add_column(name, justify="left" if not name else "right", no_wrap=True)
    grid.add_column("", no_wrap=True)
    for row in rows:
        grid.add_row(*_cells(row))
    console = Console(width=150, highlight=False)
    console.print(grid)
    console.print()


def _cells(row: Row) -> tuple[str, ...]:
    text = _FORMATS[row.unit]
    samples = row.samples
    bound = part = verdict = ""
    if row.target is not None:
        bound = f"{'>=' if row.at_least else '<='} {text(row.target)}"
        part = f"{samples.median / row.target:.2f}"
        verdict = "ok" if row.met else "MISSED"
    wide = "spread!" if samples.spread > LARGE_SPREAD and row.unit != "B" else ""
    note = ", ".join(filter(None, (row.note, wide)))
    return (row.what, text(samples.median), text(samples.least), text(samples.most), str(samples.count), bound, part,
            verdict, note)  # fmt: skip


def host_facts() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "kernel": platform.release(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "numpy", "grpcio", "blake3")}
        | {loader.name: loader.version for loader in LOADERS.values()},
        "revision": _revision(),
    }


def write(path: Path, facts: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object: the facts, and for each block its raw results and its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": SCHEMA, "facts": facts, "blocks": blocks}, indent=1))


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them."""
    return [
        {"what": row.what, "unit": row.unit, "median": row.samples.median, "min": row.samples.least,
         "max": row.samples.most, "samples": row.samples.values, "target": row.target,
         "bound": "least" if row.at_least else "most", "met": row.met, "note": row.note}
        for row in rows
    ]  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git revision, with `+` where files differ from it; None outside a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.strip() + ("+" if changes.stdout.strip() else "")
