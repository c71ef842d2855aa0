"""The command line: which commands there are, and how every one of them ends.

Owns the command table, global flags and exit codes. Imports a command's module only when that command is named, so
that `tiermem --help` answers at once and without torch, grpc or the native core.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from tiermem.cli import output
from tiermem.errors import TiermemError

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("tiermem.cli.serve", "Run the pool of this host in the foreground."),
    "load": ("tiermem.cli.load", "Load a checkpoint into the pool."),
    "unload": ("tiermem.cli.unload", "Remove a model from the pool."),
    "export": ("tiermem.cli.export", "Make a directory from which engines read a model in the pool."),
    "status": ("tiermem.cli.status", "Show tiers, models, residency and leases."),
    "top": ("tiermem.cli.top", "Show live which models, layers and pages are used."),
    "record": ("tiermem.cli.record", "Record which weights are used, into a file."),
    "report": ("tiermem.cli.report", "Show what a recording or a perf.data file holds."),
    "policy": ("tiermem.cli.policy", "Check a policy, put it in charge, see what it did."),
    "trace": ("tiermem.cli.trace", "Generate a trace of page touches, for replay."),
    "replay": ("tiermem.cli.replay", "Judge policies on a trace or a recording."),
    "doctor": ("tiermem.cli.doctor", "Show what this host can do, and why not the rest."),
    "bench": ("tiermem.cli.bench", "Time loads, engines and devices, and verify the bytes."),
    "demo": ("tiermem.cli.demo", "Show it all on this machine in a minute."),
}
"""Command -> the module whose `command` it is, and its line of help."""

INTERRUPTED = 130


@dataclass(slots=True)
class Session:
    """Global flags of this run."""

    debug: bool = False


class CommandTable(click.Group):
    """A group that knows its commands by name and imports one when it is invoked or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _print_version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        output.line(f"tiermem {output.version()}")
        ctx.exit()


@click.group(name="tiermem", cls=CommandTable)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Show the version.")  # fmt: skip
@click.pass_obj
def group(session: Session, debug: bool) -> None:
    """Model weights in memory of their own: loaded once, shared by every engine of a host, moved by policy."""
    session.debug = debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. 0 ok, 1 failed, 2 usage, 3 daemon unreachable, 4 not found, 5 refused,
    6 verification failed, 130 interrupted."""
    session = Session()
    try:
        # click returns the code of ctx.exit() here, and whatever a command returns, which is nothing.
        code = group.main(arguments, prog_name="tiermem", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        output.discard_stdout()
        return 1
    except click.exceptions.NoArgsIsHelpError as problem:
        problem.show()
        return problem.exit_code
    except click.ClickException as problem:
        output.error(_usage(problem))
        return problem.exit_code
    except Exception as problem:
        if session.debug:
            traceback.print_exc()
        if isinstance(problem, TiermemError | OSError):
            return output.error(problem)
        return output.error(f"unexpected {type(problem).__name__}: {problem}; tiermem --debug shows where")


def _usage(problem: click.ClickException) -> str:
    context = problem.ctx if isinstance(problem, click.UsageError) else None
    advice = f" (see {context.command_path} --help)" if context else ""
    return problem.format_message().rstrip(".") + advice
