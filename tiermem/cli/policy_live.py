"""`tiermem policy set` and `tiermem policy log`: the policy of a running daemon, and what it did."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes

if TYPE_CHECKING:
    from tiermem.rpc.messages import MoveEntry


@click.command("set")
@click.argument("name")
@address_flag
@json_flag
def set_command(name: str, as_json: bool, **flags: str | None) -> None:
    """Put a policy in charge: NAME is a shipped one, or the path of a file.

    A file is loaded again whenever it changes. If it cannot be loaded, the policy before stays in charge.
    """
    from tiermem.client import Client

    if name.endswith(".py"):
        name = os.path.abspath(name)
    with Client(load_config(flags).address) as client:
        warnings = client.set_policy(name)
        period_s = client.status()["migration"]["period_s"]
    if as_json:
        output.emit_json("policy-set", {"policy": name, "period_s": period_s, "warnings": list(warnings)})
        return
    for warning in warnings:
        output.note(f"warning: {warning}")
    output.line(f"{name} is in charge, and asked every {period_s:g} s")


@click.command("log")
@click.argument("model", required=False)
@click.option("--page", type=click.IntRange(0), help="Only moves of this page of MODEL.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=40, show_default=True, help="How many, newest first.")
@address_flag
@json_flag
def log_command(model: str | None, page: int | None, limit: int, as_json: bool, **flags: str | None) -> None:
    """Say what was moved, why, and why not: of all models, of MODEL, or of one page of it."""
    from tiermem.client import Client

    if page is not None and model is None:
        raise click.UsageError("--page counts within a model; name the model, too")
    with Client(load_config(flags).address) as client:
        entries = client.policy_log(model, page, limit)
    if as_json:
        output.emit_json("policy-log", {"entries": [asdict(entry) for entry in entries]})
        return
    if not entries:
        output.line("nothing was moved so far")
        return
    output.table(("when", "model", "pages", ">size", "from", "to", "outcome", "reason"), map(_row, entries))


def _row(entry: MoveEntry) -> tuple[str, ...]:
    last = entry.first + entry.pages - 1
    pages = str(entry.first) if entry.pages == 1 else f"{entry.first}-{last}"
    when = time.strftime("%H:%M:%S", time.localtime(entry.unix_s))
    return (when, entry.model, pages, format_bytes(entry.pages * PAGE_BYTES), entry.source, entry.target,
            entry.outcome, entry.reason)  # fmt: skip
