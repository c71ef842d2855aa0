"""`tiermem trace`: make a trace of page touches from a seed, for `tiermem replay`. Asks no daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tiermem.cli import output
from tiermem.cli.flags import json_flag
from tiermem.units import format_bytes, format_seconds, parse_bytes, parse_seconds


@click.command()
@click.argument("kind", type=click.Choice(["dense", "moe", "switch", "mixed", "passes"]))
@click.option("-o", "--output", "path", required=True, type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="The trace; an existing file is replaced.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Equal seeds give equal files.")
@click.option("--size", metavar="SIZE", help="Bytes of all models.")
@click.option("--duration", metavar="DURATION", help="Of what is traced.")
@click.option("--steps", "steps_per_s", type=float, help="Steps a second of dense and moe.")
@click.option("--batch", type=int, help="Tokens in a step of moe.")
@click.option("--skew", type=float, help="Exponent of Zipf's law for the experts of moe.")
@click.option("--models", type=int, help="How many switch and passes have.")
@click.option("--popularity", type=float, help="Exponent of Zipf's law for the models of switch and passes.")
@click.option("--requests", "requests_per_s", type=float, help="Requests a second of switch and passes.")
@json_flag
def command(kind: str, path: Path, size: str | None, duration: str | None, as_json: bool, **given: Any) -> None:
    """Generate a trace: dense (one model, decoded token by token), moe (a mixture of experts whose popular ones drift,
    and shift at half time), switch (300 models, requested in bursts), mixed (all of them in one pool) or passes
    (300 models of one size, each request one forward pass, for tiermem replay --devices)."""
    from tiermem.replay.generate import generate, workload

    asked = workload(kind, nbytes=parse_bytes(size) if size else None,
                     duration_s=parse_seconds(duration) if duration else None, **given)  # fmt: skip
    trace = generate(asked)
    trace.write(path)
    if as_json:
        output.emit_json("trace", {"path": path, "bytes": path.stat().st_size, "models": len(trace.names),
                                   "model_bytes": trace.nbytes, "touches": trace.touches, "duration_s": trace.end_s,
                                   "shifts_s": trace.shifts_s, **trace.facts})  # fmt: skip
        return
    output.line(
        f"{path}: {trace.touches} touches of {trace.pages} pages ({format_bytes(trace.nbytes)}) of {len(trace.names)} "
        f"models in {format_seconds(trace.end_s)}; {format_bytes(path.stat().st_size)}"
    )
