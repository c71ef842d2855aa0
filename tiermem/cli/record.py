"""`tiermem record`: write what a pool and one process do into a file, for `tiermem report` to read on any machine.

Owns the command that it starts, and the pool that it starts for it where none answers. Decides nothing about sampling.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.errors import ConfigError, DaemonUnreachable, TiermemError
from tiermem.units import format_bytes, parse_seconds

if TYPE_CHECKING:
    from tiermem.capture import Capture, Figures

_STEP_S = 0.1
_GATE = "import os, sys; f = int(sys.argv[1]); os.read(f, 1); os.close(f); os.execvp(sys.argv[2], sys.argv[2:])"
"""What a command starts as: it waits until its rings are open."""

_SERVE = (
    "import ctypes, sys; ctypes.CDLL(None).prctl(1, 15); "  # PR_SET_PDEATHSIG, SIGTERM
    "from tiermem.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
)
"""A pool that ends with whoever started it, however that ends."""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-o",
    "--output",
    "path",
    required=True,
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The recording; an existing file is replaced.",
)
@click.option("--pid", type=int, help="Also take samples of this process and of what it starts.")
@click.option("--duration", metavar="DURATION", help="End after so long; else with the command, or with Ctrl-C.")
@click.option("--epoch", metavar="DURATION", help="Look at pages so often while this lasts.")
@click.option("--budget", metavar="SHARE", help="Let that cost a client so much of its CPU time while this lasts.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@address_flag
@json_flag
def command(
    path: str, pid: int | None, duration: str | None, epoch: str | None, budget: str | None, command: Sequence[str],
    as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """Record which weights are used: samples, windows of page tables, opens, moves, and the facts of this host.

    After `--` name a COMMAND to run and sample: tiermem record -o run.tm -- python infer.py. If no pool answers, one is
    started for the command. Without a command, records the host's pool until Ctrl-C.
    """
    if command and pid is not None:
        raise click.UsageError("name a command or --pid, not both")
    if command and shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]}: there is no such program; nothing was recorded")
    config = load_config({**flags, "sample_epoch": epoch, "sample_budget": budget})
    limit_s = parse_seconds(duration) if duration else None
    asked_epoch_s = config.sample_epoch if epoch else None
    asked_budget = config.sample_budget if budget else None
    from tiermem.capture import Capture
    from tiermem.client import Client

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    with _pool(config.address, start=bool(command)) as address, Client(address) as client:
        capture = Capture(path, client, command or None, epoch_s=asked_epoch_s, budget=asked_budget)
        reason = "failed"
        try:
            reason, code = _record(capture, command, pid, limit_s, address)
        finally:
            capture.close(reason)
    _show(path, capture, reason, as_json)
    if capture.failure:
        raise TiermemError(f"{path}: {capture.failure}; the recording ends at {format_bytes(capture.nbytes)}")
    if code:
        raise TiermemError(f"{command[0]} ended with exit code {code}; what it did until then is recorded")


def _record(
    capture: Capture, command: Sequence[str], pid: int | None, limit_s: float | None, address: str
) -> tuple[str, int]:
    """Wait for the end of the recording; its reason, and the exit code of the command."""
    if not command:
        if pid is not None:
            output.note(f"samples of process {pid}: {capture.sample(pid)}")
        return _wait(capture, limit_s, lambda: pid is not None and not Path(f"/proc/{pid}").exists()), 0
    with _started(command, address) as (process, go):
        output.note(f"samples of {command[0]} (process {process.pid}): {capture.sample(process.pid)}")
        go()
        reason = _wait(capture, limit_s, lambda: process.poll() is not None)
        if capture.failure and reason == "failed":
            output.note(f"{capture.failure}: nothing more is recorded; {command[0]} goes on")
            process.wait()
        return reason, process.returncode or 0


def _wait(capture: Capture, limit_s: float | None, ended: Callable[[], bool]) -> str:
    begin = time.monotonic()
    with _interrupts() as interrupts:
        while not ended():
            if interrupts:
                return "interrupted"
            if capture.pool_ended.wait(_STEP_S):
                return "failed" if capture.failure else "the pool ended"
            if limit_s is not None and time.monotonic() - begin >= limit_s:
                return "duration"
    return "the process ended"


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM as they come. An exception would be lost where it is raised in a callback or a destructor."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _started(command: Sequence[str], address: str) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], None]]]:
    """The command, stopped before its first instruction, and what lets it go on. It is ended with the recording."""
    gate, opener = os.pipe()
    try:
        arguments = [sys.executable, "-c", _GATE, str(gate), *command]
        environ = os.environ | {"TIERMEM_ADDRESS": address}
        process = subprocess.Popen(arguments, pass_fds=[gate], env=environ)
    finally:
        os.close(gate)
    with os.fdopen(opener, "wb") as door:
        try:
            yield process, door.close
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()


@contextmanager
def _pool(address: str, *, start: bool) -> Iterator[str]:
    """The address of the host's daemon; where none answers and `start` is given, of one that lives as long as this."""
    from tiermem.client import daemon_answers

    if daemon_answers(address):
        yield address
        return
    if not start:
        raise DaemonUnreachable(f"no daemon answers at {address}; start one with tiermem serve, or record a command")
    with tempfile.TemporaryDirectory(prefix="tiermem-record-") as directory:
        own = f"unix:{directory}/s"
        arguments = [sys.executable, "-c", _SERVE, "--address", own, "--state", f"{directory}/pool"]
        environ = os.environ | {"PYTHONUNBUFFERED": "1"}
        # In a session of its own, so that Ctrl-C ends the recording first.
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environ, start_new_session=True) as daemon:
            try:
                assert daemon.stdout is not None
                if not daemon.stdout.readline().startswith(b"serving"):
                    raise ConfigError("the pool for this recording did not start; tiermem serve says why")
                yield own
            finally:
                daemon.terminate()


def _show(path: str, capture: Capture, reason: str, as_json: bool) -> None:
    figures: Figures = capture.figures
    if as_json:
        results = {"path": path, "bytes": capture.nbytes, "end": reason, "windows": figures.windows,
                   "samples": figures.samples, "foreign_samples": figures.foreign, "lost": figures.lost,
                   "dropped_frames": figures.dropped, "throttled": figures.throttled}  # fmt: skip
        output.emit_json("record", results)
        return
    output.line(
        f"{path}: {format_bytes(capture.nbytes)}, {figures.windows} windows, {figures.samples} samples in models "
        f"({figures.foreign} elsewhere), {figures.lost} lost; ended: {reason}"
    )
    if figures.dropped or figures.throttled:
        output.note(f"{figures.dropped} frames were dropped, samples were throttled {figures.throttled} times")
    if not figures.windows and not figures.samples:
        output.note("nothing was seen: open models through tiermem, and with writable=False where there is no PMU")
