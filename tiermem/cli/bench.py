"""`tiermem bench`: the user's own checkpoint, timed on the user's own host, with its bytes verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import bench_device, bench_engine, output
from tiermem.cli.flags import address_flag, config_flags, json_flag
from tiermem.config import load_config
from tiermem.errors import ModelNotFound
from tiermem.types import PAGE_BYTES, pages_of
from tiermem.units import format_bytes, format_rate, format_seconds, parse_bytes

if TYPE_CHECKING:
    from tiermem.bench.samples import Samples
    from tiermem.bench.timings import AnyPool, LoadTiming
    from tiermem.types import Manifest

_PREFAULT_SHARE = 0.25
"""Of a load's thread seconds; where prefaulting takes more, spare memory is worth its while."""

runs_flag = click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Repetitions.")


@click.group()
def command() -> None:
    """Time loads and opens of a checkpoint of yours, inference engines on it, migration of memory, or an accelerator,
    and verify the bytes.

    PATH is a checkpoint, or the name of a model in the pool; by default it is the only model of the pool. The host's
    daemon is timed if it answers, else a pool of this process; engines need a daemon.
    """


command.add_command(bench_engine.command, "engine")
command.add_command(bench_device.command, "device")


@command.command("open")
@click.argument("path", required=False)
@runs_flag
@address_flag
@json_flag
def open_command(path: str | None, runs: int, address: str | None, as_json: bool) -> None:
    """Time opening a resident model, and reading one byte of every 4 KiB of it."""
    from tiermem.bench import timings
    from tiermem.bench.samples import Samples

    with _pool(address) as (pool, kind):
        manifest = _manifest(pool, path)
        digests = timings.digests_of(manifest)
        with timings.kept_as_found(pool, manifest):
            pool.load(manifest.path)
            with output.progress(f"open {manifest.path}", runs * manifest.nbytes) as advance:
                taken = []
                for number in range(runs):
                    taken.append(timings.time_open(pool, manifest.path, digests if number == runs - 1 else None))
                    advance(manifest.nbytes)
    rows = {
        "open": Samples.of([timing.open_s for timing in taken]),
        "touch each 4 KiB": Samples.of([timing.touch_s for timing in taken]),
        "touch again": Samples.of([timing.touch_again_s for timing in taken]),
    }
    advice = _spread_advice(rows["open"])
    if as_json:
        output.emit_json("bench.open", _results(manifest, kind, rows["open"], advice) | {
            "touch_s": list(rows["touch each 4 KiB"].values), "touch_again_s": list(rows["touch again"].values),
        })  # fmt: skip
        return
    _title("open", manifest, kind, "resident")
    output.table(("", ">n", ">median", ">p95", ">min", ">max"), [_row(name, rows[name]) for name in rows])
    _close(len(digests), advice)


@command.command("load")
@click.argument("path", required=False)
@runs_flag
@click.option("--cold/--warm", default=True, show_default=True, help="Page cache empty of the files, or full.")
@address_flag
@json_flag
def load_command(path: str | None, runs: int, cold: bool, address: str | None, as_json: bool) -> None:
    """Time loading a checkpoint from its files into the pool.

    A model that is in memory is evicted before each load; one that another process reads is refused.
    """
    from tiermem.bench import timings
    from tiermem.bench.samples import Samples

    with _pool(address) as (pool, kind):
        manifest = _manifest(pool, path)
        digests = timings.digests_of(manifest)
        label = f"load {manifest.path}"
        with timings.kept_as_found(pool, manifest), output.progress(label, runs * manifest.nbytes) as advance:
            taken = []
            for _ in range(runs):
                taken.append(timings.time_load(pool, manifest, digests, cold))
                advance(manifest.nbytes)
    loads = Samples.of([timing.load_s for timing in taken])
    advice = _spread_advice(loads) + _load_advice(taken, cold)
    if as_json:
        facts = {"cache": "cold" if cold else "warm", "loads": [asdict(timing) for timing in taken]}
        output.emit_json("bench.load", _results(manifest, kind, loads, advice) | facts)
        return
    _title("load", manifest, kind, "cold" if cold else "warm")
    output.table(("", ">n", ">median", ">p95", ">min", ">max"), [_row("load", loads)])
    output.line(f"{format_rate(manifest.nbytes / loads.median)}; page cache before each load: {_cached(taken)}")
    work = ("prefault", "read", "digest")
    spent = {name: Samples.of([getattr(timing, f"{name}_thread_s") for timing in taken]).median for name in work}
    output.line("thread seconds: " + ", ".join(f"{name} {format_seconds(spent[name])}" for name in work))
    _close(len(digests), advice)


@command.command("migrate")
@click.option("--size", default="1GiB", show_default=True, help="How much is moved.")
@click.option("--nodes", nargs=2, type=int, default=(0, 1), show_default=True, help="Between which NUMA nodes.")
@click.option("--readers", default=1, show_default=True, type=click.IntRange(0, 64), help="Processes that map it.")
@runs_flag
@config_flags("backing")
@json_flag
def migrate_command(
    size: str, nodes: tuple[int, int], readers: int, runs: int, backing: str | None, as_json: bool
) -> None:
    """Time moving pages between two NUMA nodes and back, while other processes have them mapped.

    This is what page migration between DRAM and CXL memory costs on this host. The bytes are verified.
    """
    from tiermem.bench.migration import time_moves
    from tiermem.bench.samples import Samples

    nbytes = max(1, pages_of(parse_bytes(size))) * PAGE_BYTES
    taken = list(time_moves(load_config({"backing": backing}).backing, nbytes, nodes, runs, readers))
    ways = {
        f"node{source} -> node{target}": [timing for timing in taken if (timing.source, timing.target) == way]
        for way in (nodes, nodes[::-1])
        for source, target in (way,)
    }
    if as_json:
        output.emit_json("bench.migrate", {"bytes": nbytes, "readers": readers, "moves": [asdict(t) for t in taken]})
        return
    output.line(f"migrate {format_bytes(nbytes)} that {readers} other processes have mapped")
    rows = []
    for name, timings in ways.items():
        seconds = Samples.of([timing.seconds for timing in timings])
        rate = Samples.of([timing.bytes_per_s for timing in timings]).median
        refused = sum(timing.refused for timing in timings)
        rows.append((*_row(name, seconds), format_rate(rate), refused))
    output.table(("", ">n", ">median", ">p95", ">min", ">max", ">rate", ">pages refused"), rows)
    output.line("the bytes are what they were")


@contextmanager
def _pool(address: str | None) -> Iterator[tuple[AnyPool, str]]:
    """The daemon that was named or that answers, else a pool of this process; and which of them it is, in words."""
    from tiermem.client import Client, daemon_answers
    from tiermem.embedded import EmbeddedPool

    config = load_config({"address": address})
    if address is not None or daemon_answers(config.address):
        with Client(config.address) as client:
            yield client, f"daemon at {config.address}"
    else:
        with EmbeddedPool(config) as pool:
            yield pool, "embedded pool"


def _manifest(pool: AnyPool, path: str | None) -> Manifest:
    """Of a path, of a name in the pool, or of the pool's only model. Raises ModelNotFound, CheckpointError."""
    from tiermem.checkpoint import open_checkpoint
    from tiermem.paths import path_or_name_of

    name = None
    if path is not None:
        path, name = path_or_name_of(path)
    if path is None:
        models = pool.status(name)["models"]
        if len(models) != 1:
            raise ModelNotFound(f"the pool has {len(models)} models; name the checkpoint to time")
        path = str(models[0]["path"])
    return open_checkpoint(path)


def _results(manifest: Manifest, pool: str, samples: Samples, advice: Sequence[str]) -> dict[str, Any]:
    return {
        "path": manifest.path, "bytes": manifest.nbytes, "tensors": len(manifest.tensors), "pool": pool,
        "runs": samples.count, "seconds": list(samples.values), "median_s": samples.median, "p95_s": samples.p95,
        "min_s": samples.least, "max_s": samples.most, "bytes_per_s": manifest.nbytes / samples.median,
        "verified_tensors": len(manifest.tensors), "advice": list(advice),
    }  # fmt: skip


def _title(verb: str, manifest: Manifest, pool: str, state: str) -> None:
    size = f"{format_bytes(manifest.nbytes)} in {len(manifest.tensors)} tensors"
    output.line(f"{verb} {manifest.path}: {size}, {state}, {pool}")


def _row(name: str, samples: Samples) -> tuple[object, ...]:
    figures = (samples.median, samples.p95, samples.least, samples.most)
    return (name, samples.count, *map(format_seconds, figures))


def _close(verified: int, advice: Sequence[str]) -> None:
    output.line(f"{verified} tensors have the digests of their files")
    for text in advice:
        output.note(f"warning: {text}")


def _cached(taken: Sequence[LoadTiming]) -> str:
    return f"at most {max(timing.cached for timing in taken):.1%}" if taken[0].cached < 0.5 else (
        f"at least {min(timing.cached for timing in taken):.1%}")  # fmt: skip


def _spread_advice(samples: Samples) -> list[str]:
    from tiermem.bench.samples import LARGE_SPREAD

    if samples.spread <= LARGE_SPREAD:
        return []
    text = f"the slowest and the fastest run are {samples.spread:.0%} of the median apart"
    return [f"{text}; end other work on this host, or take more --runs"]


def _load_advice(taken: Sequence[LoadTiming], cold: bool) -> list[str]:
    from tiermem.bench.page_cache import WARM

    advice = []
    if not cold:
        held = min(timing.cached for timing in taken)
        short = f" and held only {held:.1%} of the files: free memory first" if held < WARM else ""
        advice.append(f"the page cache was warm{short}; a load after a reboot is slower, time it with --cold")
    prefault = sum(timing.prefault_thread_s for timing in taken)
    spent = prefault + sum(timing.read_thread_s + timing.digest_thread_s for timing in taken)
    if prefault > _PREFAULT_SHARE * spent:
        advice.append(
            f"{prefault / spent:.0%} of the threads' time went into getting memory; keep some ahead: serve --spare SIZE"
        )
    return advice
