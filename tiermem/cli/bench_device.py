"""`tiermem bench device`: what an accelerator does with weights on this host, every byte read back and compared."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tiermem.bench.samples import Samples
from tiermem.cli import output
from tiermem.cli.flags import config_flags, json_flag
from tiermem.config import load_config
from tiermem.errors import ConfigError
from tiermem.units import format_bytes, format_rate, format_seconds, parse_bytes

if TYPE_CHECKING:
    from tiermem.bench.device import AllocationTiming, CopyTiming, DeviceFacts
    from tiermem.bench.device_models import PassTiming, SwitchTiming
    from tiermem.device import Device

_PASSES = {None: "all weights there", 0: "streamed", 1: "streamed, a layer ahead"}


@click.command()
@click.argument("name", metavar="[DEVICE]", required=False)
@click.option("--size", default="1GiB", show_default=True, help="Bytes that are copied; random models have half of it.")
@click.option(
    "--model", "models", metavar="PATH|NAME", multiple=True, help="Switch between these two, given one by one."
)
@click.option(
    "--budget", metavar="SIZE", help="Of the device, for a random model three times as large to stream through."
)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Repetitions.")
@config_flags("backing")
@json_flag
def command(
    name: str | None, size: str, models: tuple[str, ...], budget: str | None, runs: int, backing: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Time DEVICE (npu:0, cuda:0; by default the one that torch uses): copies, switches between models, streaming.

    registered: the device reads the pool's memory by itself, where its runtime can. staged: through pinned memory, as
    weights go otherwise. pageable: by torch alone, from memory that its runtime does not know. A simulated device is
    refused. Bytes that did not arrive, and results that differ, end it with exit code 6.
    """
    from tiermem.bench.device import CHUNK_BYTES, chosen_device, facts_of, time_allocations

    nbytes, budget_bytes = _positive("--size", size), None if budget is None else _positive("--budget", budget)
    if len(models) not in (0, 2):
        raise ConfigError(f"--model was given {len(models)} times; name the two models to switch between, or none")
    device = chosen_device(name)
    facts = facts_of(device)
    copies = _copies(device, load_config({"backing": backing}).backing, nbytes, runs, facts.registers)
    allocation = time_allocations(device, CHUNK_BYTES, runs)
    switches = _switches(device, models, nbytes // 2, runs)
    passes = _passes(device, nbytes // 2, budget_bytes, runs)
    if as_json:
        output.emit_json("bench.device", {
            "device": asdict(facts), "runs": runs, "copies": [_copy_result(taken) for taken in copies],
            "allocation": {"bytes": allocation.nbytes, **_seconds(allocation.seconds)},
            "switches": [asdict(taken) | _seconds(taken.seconds) for taken in switches],
            "streaming": [asdict(taken) | _seconds(taken.seconds) for taken in passes], "verified": True,
        })  # fmt: skip
        return
    _show(facts, copies, allocation)
    _show_models(switches, passes)
    output.line("every byte was read back and is what was copied; streamed passes have the results of the plain one")


def _positive(option: str, text: str) -> int:
    if (nbytes := parse_bytes(text)) <= 0:
        raise ConfigError(f"{option} {text}: that is nothing; give bytes, such as 1GiB")
    return nbytes


def _copies(device: Device, backing: str, nbytes: int, runs: int, registers: bool) -> list[CopyTiming]:
    from tiermem.bench.device import IN_FLIGHT, CopyBench, host_memory

    taken = []
    total = (len(IN_FLIGHT) * (1 + registers) + 1) * runs * nbytes
    with (
        host_memory(backing, nbytes) as memory,
        closing(CopyBench(device, memory, runs)) as bench,
        output.progress(f"copies to {device.name}", total) as advance,
    ):
        for timing in bench.ways():
            taken.append(timing)
            advance(runs * nbytes)
    return taken


def _switches(device: Device, named: tuple[str, ...], nbytes: int, runs: int) -> list[SwitchTiming]:
    """Between two models of the user's, or between random ones."""
    from tiermem.bench import device_models as bench

    if named:
        with bench.own_models(named) as (first, second):
            budget = max(map(bench.room_for, (first, second)))
            return [bench.time_switches(device, f"{first.name}, {second.name}", (first, second), budget, runs)]
    with bench.random_stacks(nbytes, bench.PLAIN, bench.OTHER, bench.HALF) as stacks:
        plain, other, half = (stacks.models[name] for name in (bench.PLAIN, bench.OTHER, bench.HALF))
        one = bench.room_for(plain)
        cases = (("nothing in common", other, one), ("half in common", half, one), ("room for both", other, 2 * one))
        return [bench.time_switches(device, case, (plain, to), budget, runs) for case, to, budget in cases]


def _passes(device: Device, nbytes: int, budget_bytes: int | None, runs: int) -> list[PassTiming]:
    """Of a random model, three times the budget, or with a third of its bytes as the budget."""
    from tiermem.bench import device_models as bench

    with bench.random_stacks(bench.STREAMED * budget_bytes if budget_bytes else nbytes, bench.PLAIN) as stacks:
        budget = budget_bytes or bench.room_for(stacks.models[bench.PLAIN]) // bench.STREAMED
        return list(bench.PassBench(device, stacks, runs).passes(budget))


def _copy_result(taken: CopyTiming) -> dict[str, Any]:
    median_s = Samples.of(taken.seconds).median
    return {"way": taken.way, "in_flight": taken.in_flight, "bytes": taken.nbytes, **_seconds(taken.seconds),
            "bytes_per_s": taken.nbytes / median_s}  # fmt: skip


def _seconds(seconds: Sequence[float]) -> dict[str, Any]:
    samples = Samples.of(seconds)
    return {"seconds": list(samples.values), "median_s": samples.median, "min_s": samples.least, "max_s": samples.most}


def _show(facts: DeviceFacts, copies: Sequence[CopyTiming], allocation: AllocationTiming) -> None:
    sizes = f"{format_bytes(facts.capacity_bytes)}, {format_bytes(facts.free_bytes)} free"
    output.line(f"{facts.name}: {facts.model}, {sizes}")
    output.line(", ".join(f"{name} {version}" for name, version in facts.versions.items()))
    if facts.name == "cpu":
        output.line("cpu only stands in for a device: these copies are between places of the host's own memory")
    can = "can read" if facts.registers else "cannot read"
    output.line(f"the runtime {can} memory of the pool by itself (registration)")
    output.line("")
    rows = []
    for taken in copies:
        samples = Samples.of(taken.seconds)
        times = (samples.median, samples.least, samples.most)
        rows.append((taken.way, taken.in_flight, samples.count, *map(format_seconds, times),
                     format_rate(taken.nbytes / samples.median)))  # fmt: skip
    title = f"copies of {format_bytes(copies[0].nbytes)} from host memory"
    output.table(("way", ">in flight", ">n", ">median", ">min", ">max", ">rate"), rows, title)
    samples = Samples.of(allocation.seconds)
    output.line(f"a chunk of {format_bytes(allocation.nbytes)} is had in {format_seconds(samples.median)}")
    output.line("")


def _show_models(switches: Sequence[SwitchTiming], passes: Sequence[PassTiming]) -> None:
    rows = []
    for taken in switches:
        samples = Samples.of(taken.seconds)
        each = (taken.bytes_copied / samples.count, taken.bytes_shared / samples.count)
        times = (samples.median, samples.least, samples.most)
        rows.append((taken.case, format_bytes(taken.budget_bytes), samples.count, *map(format_bytes, each),
                     *map(format_seconds, times)))  # fmt: skip
    title = f"switches between models of {format_bytes(switches[0].model_bytes)}"
    output.table(("", ">budget", ">n", ">copied", ">not copied", ">median", ">min", ">max"), rows, title)
    output.line("")
    rows = []
    for turn in passes:
        samples = Samples.of(turn.seconds)
        rows.append((_PASSES[turn.ahead], samples.count, format_bytes(turn.peak_bytes), format_bytes(turn.copied_bytes),
                     *map(format_seconds, (samples.median, samples.least, samples.most))))  # fmt: skip
    title = f"forward passes of a model of {format_bytes(passes[0].model_bytes)}"
    output.table(("", ">n", ">weights at most", ">copied a pass", ">median", ">min", ">max"), rows, title)
