"""`tiermem load`: have the daemon load a checkpoint, and wait for it. Reads headers at most, never a tensor's bytes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.errors import TiermemError
from tiermem.peer.address import SCHEME
from tiermem.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from tiermem.client import Client
    from tiermem.rpc.messages import LoadReply
    from tiermem.types import Manifest

_POLL_S = 0.1
_PATTERN = "--layer-pattern"


@click.command()
@click.argument("path", type=click.Path())
@click.option("--name", help="Name of the model in the pool; its directory's by default.")
@click.option(_PATTERN, metavar="REGEX", help="Takes a tensor's layer from its name: what the one group matches.")
@address_flag
@json_flag
def command(path: str, name: str | None, layer_pattern: str | None, as_json: bool, **flags: Any) -> None:
    """Load the checkpoint at PATH, a directory or a file, into the pool of this host; or the model of another host's
    pool, as tiermem://HOST:PORT/NAME.

    Returns when it is resident and its bytes are verified. Tensors whose names REGEX does not match keep the layers
    that their names suggest.
    """
    from tiermem.client import Client
    from tiermem.paths import absolute

    path = absolute(path)
    layers = _layers(path, layer_pattern) if layer_pattern is not None else None
    with Client(load_config(flags).address) as client:
        # The reply to the load comes too late to tell: by then a small model may be there.
        before = {model["identity"]: model["ready_bytes"] for model in client.status()["models"]}
        started_s = time.monotonic()
        reply = client.begin_load(path, name, layers=layers)
        if layers and reply.model_id in before and reply.segments != len(_checkpoint(path, layers).segments):
            output.note(f"{reply.name} was cut into other layers before; to cut it anew, tiermem unload {reply.name}")
        with _progress(client, reply), client.open(path, layers=layers) as model:
            model.wait()
        elapsed_s = time.monotonic() - started_s
        state = client.status(reply.name)["models"][0]
    result = {
        "name": reply.name, "path": path, "identity": reply.model_id,
        "tensors": reply.tensors, "segments": reply.segments, "bytes": reply.nbytes, "page_bytes": state["page_bytes"],
        "bytes_before": before.get(reply.model_id, 0), "elapsed_s": elapsed_s, "last_load": state["last_load"],
    }  # fmt: skip
    if as_json:
        output.emit_json("load", result)
    else:
        _show(result)


def _layers(path: str, pattern: str) -> dict[str, str]:
    """Tensor -> layer by the user's regex: matched here, where a slow one holds up nobody else."""
    if path.startswith(SCHEME):
        raise click.BadParameter("the pool that has the model has cut it already", param_hint=_PATTERN)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise click.BadParameter(f"{pattern!r} is no regular expression: {error}", param_hint=_PATTERN) from None
    if regex.groups != 1:
        raise click.BadParameter(f"{pattern!r} has {regex.groups} groups; put one round the layer", param_hint=_PATTERN)
    names = [tensor.name for tensor in _checkpoint(path).tensors]
    layers = {name: match[1] for name in names if (match := regex.search(name)) and match[1]}
    if names and not layers:
        raise click.BadParameter(f"{pattern!r} matches no tensor; one is {names[0]!r}", param_hint=_PATTERN)
    return layers


def _checkpoint(path: str, layers: dict[str, str] | None = None) -> Manifest:
    from tiermem.checkpoint import open_checkpoint

    return open_checkpoint(path, layers)


@contextmanager
def _progress(client: Client, reply: LoadReply) -> Iterator[None]:
    """Shows on stderr, from a thread of its own, how far the load is."""
    over = threading.Event()
    with output.progress(f"load {reply.name}", reply.nbytes) as advance:

        def poll() -> None:
            shown = 0
            while not over.is_set():
                try:
                    ready = client.status(reply.name)["models"][0]["ready_bytes"]
                except TiermemError:
                    return  # whoever waits for the load tells why
                advance(ready - shown)
                shown = ready
                over.wait(_POLL_S)

        thread = threading.Thread(target=poll, name="tiermem-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _show(result: dict[str, Any]) -> None:
    size, elapsed_s, load = result["bytes"], result["elapsed_s"], result["last_load"]
    if result["bytes_before"] == size:
        how = f"resident already, found in {format_seconds(elapsed_s)}"
    else:
        rate = (size - result["bytes_before"]) / elapsed_s
        how = f"{'checked' if load['check_only'] else 'loaded'} in {format_seconds(elapsed_s)}, {format_rate(rate)}"
    output.line(
        f"{result['name']}: {result['tensors']} tensors in {result['segments']} segments, {format_bytes(size)}; {how}"
    )
    if load is not None and result["bytes_before"] < size:
        parts = [f"{what} {format_seconds(load[f'{what}_thread_s'])}" for what in ("prefault", "read", "digest")]
        output.line(f"thread time: {', '.join(parts)}")
