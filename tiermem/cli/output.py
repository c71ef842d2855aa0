"""What commands say, and the only file here that prints: results on stdout, all else on stderr.

Owns tables, the JSON envelope, progress and the error line. Never decides what to say, and never imports the pool.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tiermem.errors import TiermemError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PIPE_COLUMNS = 110
"""Width of a table where stdout is no terminal."""


def version() -> str:
    """The installed version; `unknown` in a source tree that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("tiermem")
    except metadata.PackageNotFoundError:
        return "unknown"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """A table on stdout. A column whose name starts with `>` is aligned to the right."""
    show(grid(columns, rows, title))


def show(thing: RenderableType) -> None:
    """Whatever rich can show, on stdout."""
    _console().print(thing)


def grid(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> Table:
    """The table that `table` prints."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        made.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def line(text: str) -> None:
    """One line on stdout, never wrapped."""
    _console().print(text, soft_wrap=True, markup=False, highlight=False)


def emit_json(name: str, results: object, schema: int = 1) -> None:
    """`--json`: one object on stdout. `results` is in base units with the unit in the keys; keys may be added to a
    schema, and its number grows when one changes or goes."""
    envelope = {"schema": f"tiermem.{name}/{schema}", "version": version(), "host": platform.node(), "results": results}
    # default=str: paths. Text that is no UTF-8 arrives as surrogates, which ASCII escapes carry unharmed.
    print(json.dumps(envelope, indent=2, default=str))


def note(text: str) -> None:
    """A remark or warning on stderr."""
    print(f"tiermem: {text}", file=sys.stderr)


def error(problem: BaseException | str) -> int:
    """The error line on stderr. Returns the exit code that goes with `problem`."""
    text = str(problem) or type(problem).__name__
    print(f"tiermem: error: {' '.join(text.splitlines())}", file=sys.stderr)
    return problem.exit_code if isinstance(problem, TiermemError) else 1


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes the bytes done since the last call; shows a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda advance_bytes: None
        return
    from rich import progress as bars

    with bars.Progress(
        bars.TextColumn("{task.description}", markup=False), bars.BarColumn(), bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(), console=_console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(label, total=total_bytes)
        yield lambda advance_bytes: bar.advance(task, advance_bytes)


def discard_stdout() -> None:
    """Drop what is still buffered: the reader of our pipe went away, and flushing at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_COLUMNS)
