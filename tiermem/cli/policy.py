"""`tiermem policy`: what decides where pages are. Never loads a policy's file into this process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tiermem.cli import output
from tiermem.cli.flags import json_flag
from tiermem.cli.policy_live import log_command, set_command
from tiermem.errors import ConfigError

if TYPE_CHECKING:
    from tiermem.policy.probe import Check


@click.group()
def command() -> None:
    """Write, check and set the policy that moves pages between tiers."""


command.add_command(set_command)
command.add_command(log_command)


@command.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--pages", type=click.IntRange(min=0, max=1 << 24), default=1_000_000, show_default=True, metavar="N",
              help="Time it on a view of so many pages.")  # fmt: skip
@json_flag
@click.pass_context
def check(ctx: click.Context, file: Path, pages: int, as_json: bool) -> None:
    """Try the policy in FILE on made-up views, in a process of its own. Ends with 1 if a check failed."""
    from tiermem.runner import check_file

    try:
        checks = list(check_file(str(file), pages))
    except FileNotFoundError:
        raise ConfigError(f"policy {file}: no such file") from None
    failed = sum(made.result == "failed" for made in checks)
    if as_json:
        facts = {"file": str(file), "pages": pages, "failed": failed}
        output.emit_json("policy-check", facts | {"checks": [asdict(made) for made in checks]})
    else:
        output.table(("check", "result", "where", ""), (_row(made, file) for made in checks))
    if failed:
        ctx.exit(1)


def _row(made: Check, file: Path) -> tuple[str, str, str, str]:
    return made.name, made.result, f"{file.name}:{made.line}" if made.line else "", made.detail
