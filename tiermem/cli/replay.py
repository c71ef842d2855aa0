"""`tiermem replay`: judge policies on a trace or a recording, in simulated time. Asks no daemon and moves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from tiermem.cli import output
from tiermem.cli.flags import json_flag
from tiermem.errors import ConfigError
from tiermem.types import PAGE_BYTES
from tiermem.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from tiermem.replay.devices import Served
    from tiermem.replay.devices import Setting as Devices
    from tiermem.replay.result import Result
    from tiermem.replay.simulate import Setting
    from tiermem.replay.trace import Trace

BUDGET_S = 10.0
"""What a plan may take. A pool allows less, but the table shows how long it took; a policy that loops ends here."""

MEMORY_ONLY = {"tiers": "--tier", "quota": "--quota", "sampling": "--sampling", "seed": "--seed", "plot": "--plot"}
"""Options that say nothing of devices."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--policy", "policies", required=True, metavar="NAME[,NAME...]",
              help="Shipped policies by name, others by the path of their .py file.")  # fmt: skip
@click.option("--tier", "tiers", multiple=True, metavar="TIER", default=("dram=1/4,cxl=rest",), show_default=True,
              help="dram=SIZE[:90ns:100GB/s],cxl=...; a size, a part of all bytes, or rest.")  # fmt: skip
@click.option("--quota", default="1GiB", show_default=True, metavar="SIZE", help="Bytes that may be moved a second.")
@click.option("--sampling", type=click.Choice(["exact", "present"]), default="exact", show_default=True,
              help="What a policy learns: every touch, or one bit a page in turns, as without a PMU.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the turns of present.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.png",
              help="Also draw the hit ratios over time.")  # fmt: skip
@click.option("--devices", metavar="N:SIZE",
              help="Instead of tiers: N devices that hold copies of SIZE each, bytes or a part of all (10:4/300). Each "
                   "visit of FILE is a request to one of them (tiermem trace passes).")  # fmt: skip
@json_flag
@click.pass_context
def command(
    context: click.Context, file: Path, policies: str, tiers: tuple[str, ...], quota: str, sampling: str, seed: int,
    plot: Path | None, devices: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Replay the page touches of FILE (by tiermem trace or tiermem record) under each policy, and compare them with a
    clairvoyant oracle and with placements that move nothing. Latencies are those of a model of the tiers."""
    from tiermem.replay.simulate import Setting
    from tiermem.replay.tier_model import parse_tier_models
    from tiermem.replay.trace import read_trace

    if not (names := [name for name in policies.split(",") if name]):
        raise ConfigError("--policy names none; write for example --policy lru,memtis,./mine.py")
    if devices is not None:
        _refuse_memory_only(context)
        _replay_devices(file, names, devices, as_json)
        return
    trace = read_trace(file)
    setting = Setting(parse_tier_models(tiers, trace.nbytes), _quota(quota), sampling, seed)
    for text in trace.notes:
        output.note(text)
    results = list(_results(trace, setting, names))
    for result in results:
        if result.failure:
            output.note(f"{result.policy} failed and was replaced by hold: {result.failure}")
    if as_json:
        told = {"file": file, "touches": trace.touches, "pages": trace.pages, "duration_s": trace.end_s,
                "shifts_s": trace.shifts_s, "facts": trace.facts, "tiers": [asdict(tier) for tier in setting.tiers],
                "quota_bytes_per_s": setting.quota_bytes_s, "sampling": sampling,
                "latency": "of a model of the tiers, not measured",
                "rows": [result.facts() for result in results]}  # fmt: skip
        output.emit_json("replay", told)
    else:
        _show(file, trace, setting, results)
    if plot is not None:
        from tiermem.replay.plot import draw

        draw(trace, results, plot)
        output.note(f"drew {plot}")


def _refuse_memory_only(context: click.Context) -> None:
    given = [option for name, option in MEMORY_ONLY.items()
             if context.get_parameter_source(name) is not ParameterSource.DEFAULT]  # fmt: skip
    if given:
        raise ConfigError(f"{', '.join(given)}: of memory tiers, and --devices has none; leave one or the other out")


def _replay_devices(file: Path, names: list[str], text: str, as_json: bool) -> None:
    from tiermem.replay.devices import parse_devices
    from tiermem.replay.trace import read_trace

    trace = read_trace(file)
    setting = parse_devices(text, trace.nbytes)
    rows = list(_served(trace, setting, names))
    for row in rows:
        if row.failure:
            output.note(f"{row.policy} failed, and the devices kept what they had: {row.failure}")
    if as_json:
        told = {"file": file, "requests": len(trace.visit_s), "touches": trace.touches, "pages": trace.pages,
                "duration_s": trace.end_s, "facts": trace.facts, "devices": setting.devices,
                "device_bytes": setting.places * PAGE_BYTES, "rows": [row.facts() for row in rows]}  # fmt: skip
        output.emit_json("replay.devices", told)
    else:
        _show_served(file, trace, setting, rows)


def _served(trace: Trace, setting: Devices, names: list[str]) -> Iterator[Served]:
    """By the policies as they were named, then by the baselines, the oracle last."""
    from tiermem.copying import Copying
    from tiermem.replay.devices import Serving, baselines
    from tiermem.replay.result import ratio
    from tiermem.runner import open_runner

    with ExitStack() as stack:
        fleets = [
            [Copying(stack.enter_context(closing(open_runner(name, BUDGET_S)))) for _ in range(setting.devices)]
            for name in names
        ]
        rows = [Serving(trace, setting, fleet).run() for fleet in fleets]
    bounds = baselines(trace, setting)
    for row in (*rows, *bounds):
        yield replace(row, oracle_share=ratio(row.hit_ratio, bounds[-1].hit_ratio))


def _show_served(file: Path, trace: Trace, setting: Devices, rows: list[Served]) -> None:
    output.line(
        f"{file}: {len(trace.visit_s)} requests of {len(trace.names)} models ({format_bytes(trace.nbytes)}) in "
        f"{format_seconds(trace.end_s)}"
    )
    output.line(f"{setting.devices} devices that hold {format_bytes(setting.places * PAGE_BYTES)} each; simulated")
    least = rows[-1].copied_bytes
    output.table(
        ("policy", ">hits", ">of oracle", ">copied", ">of oracle's", ">busiest", ">CPU a plan"),
        [
            (
                row.policy + (" (failed)" if row.failure else ""), f"{row.hit_ratio:.1%}", f"{row.oracle_share:.1%}",
                format_bytes(row.copied_bytes), f"{row.copied_bytes / least:.2f}x" if least else "",
                f"{row.busiest:.0%}" if row.plans else "", f"{row.policy_s * 1e3:.1f} ms" if row.plans else "",
            )
            for row in rows
        ],
    )  # fmt: skip


def _quota(text: str) -> int:
    quota = parse_bytes(text)
    if quota <= 0:
        raise ConfigError(f"--quota {text}: nothing could be moved; give bytes a second, such as 1GiB")
    return quota


def _results(trace: Trace, setting: Setting, names: list[str]) -> Iterator[Result]:
    """Of the policies as they were named, then of the baselines."""
    from tiermem.replay.baselines import oracle, static_baselines
    from tiermem.replay.result import ratio
    from tiermem.replay.simulate import Simulation
    from tiermem.runner import open_runner

    with ExitStack() as stack:
        # All are opened first: a name that is unknown is told before the work on the others.
        runners = [stack.enter_context(closing(open_runner(name, BUDGET_S))) for name in names]
        best = oracle(trace, setting)
        rows = [Simulation(trace, setting, runner).run() for runner in runners]
    for result in (*rows, *static_baselines(trace, setting), best):
        yield replace(result, oracle_share=ratio(result.hit_ratio, best.hit_ratio))


def _show(file: Path, trace: Trace, setting: Setting, results: list[Result]) -> None:
    tiers = ", ".join(
        f"{tier.kind} {format_bytes(tier.capacity_bytes)} ({tier.idle_latency_s * 1e9:.0f} ns, "
        f"{tier.bandwidth_bytes_s / 1e9:.0f} GB/s)"
        for tier in setting.tiers
    )
    output.line(f"{file}: {trace.touches} touches of {format_bytes(trace.nbytes)} in {format_seconds(trace.end_s)}")
    output.line(f"{tiers}; quota {format_bytes(setting.quota_bytes_s)}/s; sampling {setting.sampling}")
    output.line("hits and moves are simulated; slowdown is by a model of the tiers, not measured")
    columns = (
        "policy",
        ">hits",
        ">of oracle",
        ">slowdown",
        ">moved",
        ">useful",
        ">ping-pong",
        ">settles",
        ">CPU a plan",
    )
    output.table(columns, [_row(result) for result in results])


def _row(result: Result) -> list[str]:
    useful = f"{result.useful_bytes / result.promoted_bytes:.0%}" if result.promoted_bytes else ""
    return [
        result.policy + (" (failed)" if result.failure else ""), f"{result.hit_ratio:.1%}",
        f"{result.oracle_share:.1%}", "" if result.slowdown != result.slowdown else f"{result.slowdown:.2f}x",
        format_bytes(result.moved_bytes) if result.moved_bytes else "", useful, str(result.ping_pongs or ""),
        "" if result.convergence_s is None else f"{result.convergence_s:.0f} s",
        f"{result.policy_s * 1e3:.1f} ms" if result.ticks else "",
    ]  # fmt: skip
