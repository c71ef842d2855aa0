"""`tiermem serve`: run the daemon of this host in the foreground until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import config_flags
from tiermem.config import BY_KEY, load_config
from tiermem.units import format_bytes

if TYPE_CHECKING:
    from tiermem.pool import Pool


@click.command()
@config_flags(*BY_KEY)
def command(**flags: Any) -> None:
    """Own model weights on this host and serve them to its processes.

    Prints one line when clients can connect. SIGTERM or Ctrl-C ends it: leases end, memory is given back (or, with
    --keep, left for the next daemon). Processes that hold weights keep reading them.
    """
    import asyncio

    # Before gRPC is imported: a stranger's handshake that fails is his to hear of, and not a line of our log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from tiermem.server import serve

    config = load_config(flags)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def ready(pool: Pool) -> None:
        sizes = ", ".join(f"{format_bytes(tier.capacity_bytes or 0)} of {tier.name}" for tier in pool.tiers.memory)
        output.line(
            f"serving {config.address}: {sizes} on {pool.memory.backing.kind}, {len(pool.catalog)} models adopted"
        )

    asyncio.run(serve(config, ready))
