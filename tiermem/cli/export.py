"""`tiermem export`: make a directory through which engines read a model out of the pool. Never touches weights."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tiermem.export import Exported


@click.command()
@click.argument("path_or_name", required=False, type=click.Path())
@click.argument("directory", metavar="DIR", required=False, type=click.Path())
@click.option("--undo", metavar="DIR", type=click.Path(), help="Remove what an export made in DIR, and its image.")
@address_flag
@json_flag
def command(path_or_name: str | None, directory: str | None, undo: str | None, as_json: bool, **flags: Any) -> None:
    """Make DIR one from which engines read the weights of PATH_OR_NAME in the pool, with their own loaders.

    Its weights files are links to memory that all readers share, and whatever else lies in the checkpoint's directory
    is linked. The weights stay in memory until the export is undone.
    """
    if undo is not None:
        if path_or_name is not None:
            raise click.UsageError("--undo takes the one directory that is to go")
        _undo(undo, as_json, flags)
        return
    if path_or_name is None or directory is None:
        raise click.UsageError(f"Missing argument {'DIR' if path_or_name else 'PATH_OR_NAME'!r}")
    from tiermem.client import Client
    from tiermem.export import export

    with Client(load_config(flags).address) as client:
        started_s = time.monotonic()
        exported = export(client, path_or_name, directory)
        elapsed_s = time.monotonic() - started_s
    if as_json:
        output.emit_json("export", {**_keyed(exported), "elapsed_s": elapsed_s})
    else:
        how = "made" if exported.created else "found"
        output.line(
            f"{exported.directory}: {len(exported.weights)} weights files of {format_bytes(exported.nbytes)} and "
            f"{exported.linked} others; image {exported.image} {how} in {format_seconds(elapsed_s)}"
        )


def _undo(directory: str, as_json: bool, flags: dict[str, Any]) -> None:
    from tiermem.client import Client
    from tiermem.export import address_of, undo

    with Client(flags["address"] or address_of(directory)) as client:
        is_gone = undo(client, directory)
    if as_json:
        output.emit_json("export-undo", {"directory": directory, "left": not is_gone})
    else:
        output.line(f"{directory}: undone" + ("" if is_gone else "; what was put there since stays"))


def _keyed(exported: Exported) -> dict[str, Any]:
    fields = asdict(exported)
    return {"bytes" if key == "nbytes" else key: value for key, value in fields.items()}
