"""`tiermem unload`: take a model out of the pool, or only out of its memory. Never ends another process's lease."""

from __future__ import annotations

from typing import Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.units import format_bytes


@click.command()
@click.argument("name")
@click.option("--evict", is_flag=True, help="Free its memory only; the next open brings it back.")
@address_flag
@json_flag
def command(name: str, evict: bool, as_json: bool, **flags: Any) -> None:
    """Remove the model NAME from the pool and free its memory.

    Refused while a process reads it or a pin holds it: tiermem status NAME shows which.
    """
    from tiermem.client import Client

    with Client(load_config(flags).address) as client:
        freed = client.evict(name) if evict else client.remove(name)
    if as_json:
        output.emit_json("unload", {"name": name, "known": evict, "freed_bytes": freed})
    else:
        output.line(f"{name}: {'evicted' if evict else 'removed'}, {format_bytes(freed)} freed")
