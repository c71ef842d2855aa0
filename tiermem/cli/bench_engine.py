"""`tiermem bench engine`: inference engines on the user's own checkpoint, by themselves and through the pool."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiermem.bench.engine_cases import ATTACH, ENGINES, OWN, POPULATE, version_of
from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.errors import CheckpointNotFound, ModelNotFound, Refused
from tiermem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tiermem.bench.engine import EngineTimings
    from tiermem.client import Client

_FIGURES = {"load_s": format_seconds, "first_output_s": format_seconds, "private_bytes": format_bytes,
            "pss_bytes": format_bytes}  # fmt: skip


@click.command()
@click.argument("engines", metavar="[ENGINE]...", nargs=-1, type=click.Choice(tuple(ENGINES)))
@click.option("--model", metavar="PATH", help="A checkpoint; by default that of the only model of the pool.")
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Repetitions of each way to load.")
@click.option("--processes", default=1, type=click.IntRange(1, 64), help="And at last so many at once.")
@click.option("--cold/--warm", default=False, show_default=True, help="Page cache empty of the files, or full.")
@address_flag
@json_flag
def command(
    engines: tuple[str, ...],
    model: str | None,
    runs: int,
    processes: int,
    cold: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Time inference engines: their own loader against the pool, in turns, each time in a fresh process.

    ENGINE is vllm, transformers, onnxruntime, llama.cpp or mindspore; by default every one that this interpreter has
    and that reads the checkpoint. own: the engine's own loader. populate: through a pool that has nothing of the
    model. attach: through one that has it resident. Needs a daemon, which is left as it was found. Answers that
    differ end it with exit code 6.
    """
    from tiermem.bench.engine import EngineBench
    from tiermem.bench.engine_process import Unusable
    from tiermem.checkpoint import open_checkpoint
    from tiermem.client import Client

    with Client(load_config({"address": address}).address) as client, tempfile.TemporaryDirectory() as room:
        path = Path(model).absolute() if model else _only_model(client)
        files, left_out = _chosen(path, engines)
        results = []
        for name, file in files.items():
            manifest = open_checkpoint(file)
            bench = EngineBench(client, manifest, Path(room), cold)
            steps = 3 * runs + (2 if processes > 1 else 0)
            with output.progress(f"{name} {file}", steps * manifest.nbytes) as advance:
                try:
                    timings = bench.time(ENGINES[name], file, runs, processes, partial(advance, manifest.nbytes))
                except Unusable as problem:
                    left_out[name] = f"it cannot be imported: {problem}"
                    continue
            results.append(_result(name, file, manifest.nbytes, timings))
            if not as_json:
                _show(name, file, manifest.nbytes, timings)
        if not results or any(name in left_out for name in engines):
            raise Refused("; ".join(f"{name} was not timed: {reason}" for name, reason in left_out.items()))
    cache = "cold" if cold else "warm"
    if as_json:
        facts = {"path": str(path), "cache": cache, "runs": runs, "python": sys.executable}
        output.emit_json("bench.engine", facts | {"engines": results, "not_timed": left_out})
        return
    output.line(f"own loader: page cache {cache}; every engine gave the same answers, whoever loaded the weights")
    for name, reason in left_out.items():
        output.line(f"{name} was not timed: {reason}")


def _only_model(client: Client) -> Path:
    models = [model for model in client.status()["models"] if not model["fingerprint"]]
    if len(models) != 1:
        raise ModelNotFound(f"the pool has {len(models)} models; name the checkpoint to time: --model PATH")
    return Path(models[0]["path"])


def _chosen(path: Path, engines: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, str]]:
    """What each engine is given, and why the others are given nothing. Raises CheckpointNotFound."""
    if not path.exists():
        raise CheckpointNotFound(f"{path}: there is nothing; name the directory or file of a checkpoint")
    files, left_out = {}, {}
    for name in engines or ENGINES:
        engine = ENGINES[name]
        file = engine.reads(path)
        if version_of(engine) is None:
            left_out[name] = f"it is not installed for {sys.executable}: pip install {engine.distribution}"
        elif file is None:
            left_out[name] = f"it reads {engine.takes}, and {path} has none, or several"
        else:
            files[name] = file
    return files, left_out


def _result(name: str, file: Path, nbytes: int, timings: EngineTimings) -> dict[str, Any]:
    medians = {way: {figure: timings.samples(way, figure).median for figure in _FIGURES} for way in timings.ways}
    faster = {
        way: {figure: medians[OWN][figure] / medians[way][figure] for figure in ("load_s", "first_output_s")}
        for way in (POPULATE, ATTACH)
    }
    return {
        "engine": name, "engine_version": version_of(ENGINES[name]), "path": str(file), "bytes": nbytes,
        "ways": {way: [asdict(timing) for timing in taken] for way, taken in timings.ways.items()},
        "medians": medians, "times_faster": faster, "answers_identical": True,
        "processes": {way: asdict(crowd) for way, crowd in timings.crowds.items()},
    }  # fmt: skip


def _show(name: str, file: Path, nbytes: int, timings: EngineTimings) -> None:
    output.line(f"{name} {version_of(ENGINES[name])}, {file}: {format_bytes(nbytes)}")
    rows = []
    for way, taken in timings.ways.items():
        medians = {figure: timings.samples(way, figure).median for figure in _FIGURES}
        ratio = timings.samples(OWN, "load_s").median / medians["load_s"]
        shown = (show(medians[figure]) for figure, show in _FIGURES.items())
        rows.append((way, len(taken), *shown, "" if way == OWN else f"{ratio:.1f} x"))
    output.table(("", ">n", ">load", ">first output", ">private", ">PSS", ">load is faster"), rows)
    crowds = [
        (f"{crowd.processes} at once, {way}", format_bytes(crowd.private_bytes), format_bytes(crowd.pss_bytes),
         format_bytes(crowd.shared_bytes), format_bytes(crowd.pool_bytes) if crowd.pool_bytes else "")
        for way, crowd in timings.crowds.items()
    ]  # fmt: skip
    if crowds:
        output.table(("", ">private", ">PSS", ">of it shared memory", ">one copy in the pool"), crowds)
    output.line("")
