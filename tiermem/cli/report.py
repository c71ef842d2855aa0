"""`tiermem report`: what a recording or a perf.data file tells, as tables, JSON or a picture. Asks no daemon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import json_flag
from tiermem.errors import ConfigError, RecordingError
from tiermem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tiermem.perfdata import PerfData
    from tiermem.recording import Recording

SHOWN_ROWS = 40
"""Rows of a table where --limit is not given."""

_PERF_MAGICS = (b"PERFILE2", b"2ELIFREP", b"PERFFILE")


@click.command()
@click.argument("what", required=False, type=click.Choice(["heat", "accesses", "threads", "functions"]))
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--perf-data", type=click.Path(path_type=Path), metavar="FILE",
              help="Show samples and heat of a file that perf record wrote.")  # fmt: skip
@click.option("--by", type=click.Choice(["model", "layer", "tensor", "expert", "page"]), default="layer",
              show_default=True, help="What a row of heat is; perf.data has files and pages.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=0), metavar="N",
              help=f"Show at most N rows, 0 for all. [default: {SHOWN_ROWS}, with --json all]")  # fmt: skip
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT",
              help="With heat, also draw it over time into this file.")  # fmt: skip
@json_flag
def command(
    what: str | None, file: Path | None, perf_data: Path | None, by: str, limit: int | None, png: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what a recording holds: the heat of its pages, the accesses and passes in the order of time, the threads
    or the functions that made them. FILE is what tiermem record or perf record wrote."""
    path = _the_file(what, file, perf_data)
    whats = (what,) if what else ("accesses", "heat")
    if png is not None and "heat" not in whats:
        raise ConfigError(f"--png draws heat, not {what}; write tiermem report heat {path} --png {png}")
    source = open_source(path, perf_only=perf_data is not None)
    rows_shown = limit if limit is not None else 0 if as_json else SHOWN_ROWS
    results = {name: _report(source, name, by, rows_shown) for name in whats}
    for text in dict.fromkeys((*source.notes, *(text for result in results.values() for text in result["notes"]))):
        output.note(_plain(text))
    if as_json:
        facts = {"file": str(path), "notes": list(source.notes)}
        output.emit_json("report", facts | results)
    else:
        _show(source, path, results)
    if png is not None:
        from tiermem.report.plot import draw

        draw(source, png)
        output.note(f"drew {png}")


def _the_file(what: str | None, file: Path | None, perf_data: Path | None) -> Path:
    if (path := perf_data or file) is None or (perf_data and file):
        raise ConfigError("name one FILE: tiermem report heat FILE, or tiermem report --perf-data FILE")
    if what is None and perf_data is None:
        raise ConfigError(f"say what of {path}: heat, accesses, threads or functions")
    return path


def open_source(path: Path, perf_only: bool = False) -> Recording | PerfData:
    """What is in a file, by its first bytes. Raises RecordingError for one that is neither, or is damaged; OSError."""
    from tiermem import perfdata, recording

    with open(path, "rb") as file:
        start = file.read(len(recording.MAGIC))
    if start.startswith(_PERF_MAGICS):
        return perfdata.read(str(path))
    if start == recording.MAGIC:
        if perf_only:
            raise RecordingError(f"{path}: it is a recording of tiermem; leave --perf-data away")
        return recording.read(path)
    what = f"begins with {start[:8]!r}" if start else "is empty"
    raise RecordingError(f"{path} {what}; a report reads what tiermem record, or perf record --data, wrote")


def _report(source: Recording | PerfData, what: str, by: str, limit: int) -> dict[str, Any]:
    """The rows of one report, `limit` of `total_rows` (0: all), and what is to be said about them."""
    from tiermem.perfdata import PerfData

    notes: list[str] = []
    extra: dict[str, Any] = {}
    rows: Sequence[Any]
    total = None
    if what == "heat":
        rows, extra = _heat(source, by), {"by": by}
    elif what == "accesses":
        from tiermem.report.accesses import accesses
        from tiermem.report.passes import orders

        rows, total = accesses(source, limit or None), len(source.samples)
        if not isinstance(source, PerfData):
            extra["orders"] = [asdict(order) for order in orders(source)]
    elif what == "threads":
        from tiermem.report.threads import threads

        rows = threads(source)
    else:
        from tiermem.report.functions import functions

        rows, notes = functions(source)
    if what in ("threads", "functions") and not rows:
        notes = [*notes, f"there are no samples, and only those tell {what}; record with perf events"]
    shown = [_keys(asdict(row)) for row in rows[: limit or None]]
    return {"rows": shown, "total_rows": len(rows) if total is None else total, "notes": notes, **extra}


def _heat(source: Recording | PerfData, by: str) -> list[Any]:
    from tiermem.perfdata import PerfData
    from tiermem.report.heat import file_heat, heat

    if isinstance(source, PerfData):
        return list(file_heat(source, by_page=by == "page"))
    rows = heat(source, by)
    # Few rows are read in the order of the checkpoint, many from the hottest on.
    return rows if by in ("model", "layer") else sorted(rows, key=lambda row: -row.observed / max(row.pages, 1))


def _keys(row: dict[str, Any]) -> dict[str, Any]:
    """Keys as the JSON has them, with their unit."""
    return {"bytes" if key == "nbytes" else key: value for key, value in row.items()}


def _show(source: Recording | PerfData, path: Path, results: dict[str, dict[str, Any]]) -> None:
    output.line(_plain(_summary(source, path)))
    for what, result in results.items():
        for title, columns, rows in _TABLES[what](result):
            output.line("")
            output.table(columns, [[_plain(str(cell)) for cell in row] for row in rows], title)
        if (more := result["total_rows"] - len(result["rows"])) > 0:
            output.note(f"{more} more rows of {what}; --limit 0 shows all")


def _summary(source: Recording | PerfData, path: Path) -> str:
    from tiermem.perfdata import PerfData

    names = ", ".join(event.name for event in source.events) or "none"
    if isinstance(source, PerfData):
        lost = source.lost + source.lost_samples
        return (
            f"{path}: {len(source.samples)} samples, {lost} lost, events {names}; recorded on {source.hostname or '?'}"
        )
    seconds = format_seconds(max(source.end_s - source.begin_s, 0))
    seen = f"{len(source.windows)} windows, {len(source.samples)} samples, events {names}"
    return f"{path}: {seconds} of {len(source.models)} models, {seen}"


_Table = tuple[str | None, Sequence[str], Iterable[Sequence[object]]]


def _heat_tables(result: dict[str, Any]) -> list[_Table]:
    rows = result["rows"]
    if rows and "file" in rows[0]:
        files = ([r["file"], _or(r["page"]), r["pages"], r["samples"], f"{r['share']:.1%}"] for r in rows)
        return [(None, ("file", ">page", ">pages", ">samples", ">share"), files)]
    columns = ["model", "part", ">page", ">pages", ">bytes", ">touched", ">cold", ">unknown", ">rate/s", ">age", "by"]
    cells = [_heat_row(row) for row in rows]
    # What every row would have alike is left out: most terminals are narrow.
    hidden = [1] if result["by"] == "model" else [3, 4] if result["by"] == "page" else []
    hidden += [2] if result["by"] != "page" else []
    if 1 not in hidden and len({row[0] for row in cells}) == 1:
        hidden.insert(0, 0)
    shown = [i for i in range(len(columns)) if i not in hidden]
    return [(None, [columns[i] for i in shown], ([row[i] for i in shown] for row in cells))]


def _heat_row(row: dict[str, Any]) -> list[object]:
    rate, age_s = row["touches_per_s"], row["age_s"]
    return [
        row["model"], row["part"], _or(row["page"]), row["pages"], format_bytes(row["bytes"]), row["touched"],
        row["cold"], row["unknown"], "?" if rate is None else f"{rate:.3g}",
        "" if age_s is None else format_seconds(age_s), ", ".join(row["rungs"]),
    ]  # fmt: skip


def _access_tables(result: dict[str, Any]) -> list[_Table]:
    tables: list[_Table] = []
    if result.get("orders"):
        passes = [
            (o["pid"], o["comm"], o["model"], o["layers"], len(o["passes"]), o["complete"], f"{o['forward']:.0%}",
             o["verdict"])
            for o in result["orders"]
        ]  # fmt: skip
        columns = (">pid", "process", "model", ">layers", ">passes", ">complete", ">forward", "layers touched")
        tables.append(("passes", columns, passes))
    start_s = result["rows"][0]["time_s"] if result["rows"] else 0.0
    samples = [
        (f"{r['time_s'] - start_s:.6f}", r["tid"], r["comm"], f"{r['address']:x}", r["model"],
         r["tensor"] or r["layer"], _or(r["page"]), r["source"], r["latency_cycles"] or "")
        for r in result["rows"]
    ]  # fmt: skip
    if samples or not tables:
        headings = (">seconds", ">tid", "thread", "address", "model", "tensor", ">page", "source", ">cycles")
        tables.append(("samples", headings, samples))
    return tables


def _thread_tables(result: dict[str, Any]) -> list[_Table]:
    rows = [
        (r["pid"], r["tid"], r["comm"], r["samples"], f"{r['share']:.1%}", r["in_models"], ", ".join(r["models"]))
        for r in result["rows"]
    ]
    return [(None, (">pid", ">tid", "thread", ">samples", ">share", ">in models", "models"), rows)]


def _function_tables(result: dict[str, Any]) -> list[_Table]:
    rows = [(r["symbol"], r["file"], r["samples"], f"{r['share']:.1%}") for r in result["rows"]]
    return [(None, ("function", "file", ">samples", ">share"), rows)]


_TABLES = {
    "heat": _heat_tables, "accesses": _access_tables, "threads": _thread_tables, "functions": _function_tables,
}  # fmt: skip


def _or(value: object) -> object:
    return "" if value is None else value


def _plain(text: str) -> str:
    """Text of a file as a terminal may get it: names of threads and tensors may hold control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
