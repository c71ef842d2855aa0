"""`tiermem top`: which models and layers are used right now, by which rung that is known, and what knowing it costs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tiermem.client import Client
    from tiermem.heat import HeatColumns
    from tiermem.statistics import ModelHeat

_BAR = 20


@click.command()
@click.argument("name", required=False)
@click.option("--interval", default=1.0, show_default=True, help="Seconds between looks.")
@click.option("--once", is_flag=True, help="Look once and end, as where stdout is no terminal.")
@address_flag
@json_flag
def command(name: str | None, interval: float, once: bool, as_json: bool, **flags: Any) -> None:
    """Show live which models are used, or which layers of model NAME.

    A page is hot or cold only where it was sampled; `known` says of how many pages that is so.
    """
    if not 0 < interval < float("inf"):
        raise click.UsageError("--interval must be above 0")
    from tiermem.client import Client

    with Client(load_config(flags).address) as client:
        if as_json:
            output.emit_json("top", _facts(client, name))
        elif once or not sys.stdout.isatty():
            output.show(_screen(client, name))
        else:
            _live(client, name, interval)


def _live(client: Client, name: str | None, interval_s: float) -> None:
    from rich.live import Live

    with Live(_screen(client, name), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(_screen(client, name), refresh=True)


def _facts(client: Client, name: str | None) -> dict[str, Any]:
    status = client.status(name)
    facts: dict[str, Any] = {"sampling": status["sampling"], "models": [
        {"name": model["name"], "bytes": model["bytes"], **model["heat"]} for model in status["models"]
    ]}  # fmt: skip
    if name is not None:
        facts["layers"] = [_layer_facts(layer, columns) for layer, columns in client.heat(name).by_layer()]
    return facts


def _layer_facts(layer: str, columns: HeatColumns) -> dict[str, Any]:
    known = columns.known
    rate, age = columns.rate[known], columns.age_s[columns.age_s == columns.age_s]
    return {
        "layer": layer, "pages": len(columns), "known_pages": int(known.sum()), "touched_pages": int((rate > 0).sum()),
        "touches_per_s": float(rate.mean()) if len(rate) else None, "age_s": float(age.min()) if len(age) else None,
    }  # fmt: skip


def _screen(client: Client, name: str | None) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    status = client.status(name)
    parts: list[RenderableType] = [Text(line) for line in _sampling_lines(status["sampling"])]
    parts.append(Text(""))
    parts.append(_models(status["models"]) if name is None else _layers(client.heat(name)))
    return Group(*parts)


def _sampling_lines(sampling: Mapping[str, Any]) -> list[str]:
    lines = [f"sampling: {sampling['rung']} ({sampling['reason']})"]
    for rung, cost in sampling["rungs"].items():
        seen = (
            f"{cost['samples']} samples" if cost["samples"] else f"{cost['touched']} of {cost['pages']} pages touched"
        )
        spent = cost["sampler_s"] + cost["fault_s"]
        share = f" = {spent / cost['client_s']:.2%} of the clients' CPU time" if cost["client_s"] else ""
        lost = f", {cost['lost'] + cost['lost_samples']} lost" if cost["lost"] + cost["lost_samples"] else ""
        lines.append(f"  {rung}: {seen}{lost}, cost {format_seconds(spent)}{share}")
    for client in sampling["clients"]:
        if client["refused"]:
            lines.append(f"  process {client['pid']}: {client['refused']}")
    return lines


def _models(models: list[dict[str, Any]]) -> RenderableType:
    return output.grid(
        ("model", ">bytes", ">readers", ">known", ">touched", ">touches/s", "seen by"),
        [
            (model["name"], format_bytes(model["bytes"]), len(model["readers"]), *_parts(model["heat"]),
             f"{model['heat']['touches_per_s']:.1f}", ", ".join(model["heat"]["rungs"]) or "nothing yet")
            for model in sorted(models, key=lambda model: -model["heat"]["touches_per_s"])
        ],
    )  # fmt: skip


def _layers(heat: ModelHeat) -> RenderableType:
    facts = [_layer_facts(layer, columns) for layer, columns in heat.by_layer()]
    most = max((fact["touches_per_s"] or 0.0 for fact in facts), default=0.0) or 1.0
    return output.grid(
        ("layer", ">pages", ">known", ">touched", ">touches/s", "", ">last seen"),
        [
            (fact["layer"], fact["pages"], *_parts(fact), _number(fact["touches_per_s"]),
             "#" * round(_BAR * (fact["touches_per_s"] or 0.0) / most),
             "never" if fact["age_s"] is None else format_seconds(fact["age_s"]))
            for fact in facts
        ],
    )  # fmt: skip


def _parts(fact: Mapping[str, Any]) -> tuple[str, str]:
    known = fact["known_pages"]
    return f"{known / max(fact['pages'], 1):.0%}", f"{fact['touched_pages'] / known:.0%}" if known else "unknown"


def _number(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate:.1f}"
