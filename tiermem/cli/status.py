"""`tiermem status`: what the daemon holds and who reads it, as tables. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import click

from tiermem.cli import output
from tiermem.cli.flags import address_flag, json_flag
from tiermem.config import load_config
from tiermem.units import format_bytes, format_rate, format_seconds


@click.command()
@click.argument("name", required=False)
@address_flag
@json_flag
def command(name: str | None, as_json: bool, **flags: Any) -> None:
    """Show the pool's tiers and models, or of the model NAME also where each layer is, and what an image is of."""
    from tiermem.client import Client

    with Client(load_config(flags).address) as client:
        address, status = client.address, client.status(name)
    if as_json:
        output.emit_json("status", {"address": address, **status})
        return
    _show_pool(address, status)
    if name is None:
        _show_models(status["models"])
    else:
        _show_model(status["models"][0])


def _show_pool(address: str, status: dict[str, Any]) -> None:
    pool, spare = status["pool"], status["spare"]
    output.line(
        f"pool {pool['id']} at {address}, process {pool['pid']}, up {format_seconds(pool['uptime_s'])}, "
        f"policy {status['migration']['policy']}, leases {pool['leases']}"
    )
    output.line(f"segments on {pool['backing']}: {pool['backing_reason']}")
    if spare["target_bytes"]:
        output.line(f"spare: {format_bytes(spare['ready_bytes'])} of {format_bytes(spare['target_bytes'])} prefaulted")
    _show_migration(status["migration"], len(status["tiers"]) > 2)
    if pool["catalog_error"]:
        output.note(f"the catalog cannot be written: {pool['catalog_error']}")
    if pool["quarantined_loads"]:
        output.note(f"{pool['quarantined_loads']} adopted models had damaged bytes and were dropped")
    output.line("")
    columns = ("tier", ">used", ">capacity", ">fill", "nodes", ">latency", ">bandwidth")
    output.table(columns, [_tier_row(tier) for tier in status["tiers"]])
    _show_devices(status["devices"])
    _show_remote(status["remote"])


def _show_migration(migration: dict[str, Any], several_tiers: bool) -> None:
    if migration["policy_failure"]:
        output.note(f"the policy failed, and nothing is moved or evicted: {migration['policy_failure']}")
    if not several_tiers:
        return
    moved = ", ".join(f"{pages} {way}" for way, pages in migration["moved_pages"].items()) or "none"
    refused = ", ".join(f"{pages} {cause}" for cause, pages in migration["refused"].items())
    output.line(f"pages moved: {moved}" + (f"; not moved: {refused}" if refused else ""))
    if not migration["moves_shared"]:
        output.note("pages that clients have mapped cannot move: the daemon lacks CAP_SYS_NICE")


def _tier_row(tier: dict[str, Any]) -> tuple[str, ...]:
    used, capacity = tier["used_bytes"], tier["capacity_bytes"]
    if capacity is None:
        return tier["name"], "", "unbounded", "", "", "", ""
    nodes = "+".join(map(str, tier["nodes"])) + ("" if tier["online"] else " offline")
    latency, bandwidth = tier["idle_latency_s"], tier["bandwidth_bytes_s"]
    return (
        tier["name"], format_bytes(used), format_bytes(capacity) if capacity else "not known yet",
        f"{used / capacity:.0%}" if capacity else "", nodes,
        format_seconds(latency) if latency else "", format_rate(bandwidth) if bandwidth else "",
    )  # fmt: skip


def _show_devices(devices: Sequence[dict[str, Any]]) -> None:
    """What processes have on devices, where any has."""
    if not devices:
        return
    output.line("")
    rows = [
        (device["device"], device["pid"], device["model"], format_bytes(device["held_bytes"]),
         format_bytes(device["budget_bytes"]), device["orders"], device["tier"] or "none")
        for device in devices
    ]  # fmt: skip
    output.table(("device", ">process", "model", ">copies", ">budget", ">orders", "tier"), rows)


def _show_remote(remote: dict[str, Any]) -> None:
    """Other hosts' pools, where there are any to speak of."""
    if remote["listen"]:
        refused = f"; {remote['refused']} refused, {remote['cut']} cut off" if remote["refused"] + remote["cut"] else ""
        output.line("")
        how = f"by TLS, as {remote['tls_name']}" if remote["tls"] else "in the clear"
        output.line(f"listens for peers at {remote['listen']} {how}; weights leave by port {remote['data_port']}")
        sent, connections = format_bytes(remote["sent_bytes"]), f"{remote['accepted']} connections"
        output.line(f"sent {sent} by {connections}, {remote['connections']} of them open{refused}")
        if pinned := remote["exports"]["pinned_bytes"]:
            readers = remote["exports"]["queue_pairs"]
            output.line(f"{format_bytes(pinned)} are pinned for RDMA, which {readers} queue pairs read")
    if remote["peers"]:
        output.line("")
        output.line(f"weights come by {remote['transport']['name']}: {remote['transport']['reason']}")
        columns = ("peer", "connected", "called", ">received", "by", "why", "last error")
        output.table(columns, [_peer_row(peer) for peer in remote["peers"]])
    if remote["served"]:
        output.line("")
        rows = [
            (peer["peer"], ", ".join(peer["hosts"]), peer["sessions"], peer["leases"], format_bytes(peer["sent_bytes"]))
            for peer in remote["served"]
        ]
        output.table(("serves", "at", ">sessions", ">leases", ">sent"), rows)


def _peer_row(peer: dict[str, Any]) -> tuple[str, ...]:
    ago_s, way = peer["used_ago_s"], peer["transport"] or {"name": "", "reason": ""}
    return (
        peer["address"], "yes" if peer["connected"] else "no", "" if ago_s is None else f"{format_seconds(ago_s)} ago",
        format_bytes(peer["received_bytes"]), way["name"], way["reason"], peer["error"],
    )  # fmt: skip


def _show_models(models: list[dict[str, Any]]) -> None:
    output.line("")
    if not models:
        output.line("no models; tiermem load PATH brings one")
        return
    rows = [
        (model["name"], _state(model), format_bytes(model["bytes"]), model["leases"],
         len(model["readers"]) + len(model["peers"]), model["pins"], model["opens"], _origin(model))
        for model in models
    ]  # fmt: skip
    output.table(("model", "state", ">bytes", ">leases", ">readers", ">pins", ">opens", "from"), rows)


def _origin(model: dict[str, Any]) -> str:
    """The pool that it came from, in place of the model's address there, which may be long."""
    return str(model["path"]).split("/")[2] if model["origin"] == "peer" else str(model["origin"])


def _state(model: dict[str, Any]) -> str:
    if model["state"] != "loading" or not model["bytes"]:
        return str(model["state"])
    return f"loading {model['ready_bytes'] / model['bytes']:.0%}"


def _show_model(model: dict[str, Any]) -> None:
    readers = ", ".join(map(str, (*model["readers"], *model["peers"]))) or "none"
    output.line("")
    output.line(f"{model['name']}: {model['path']}")
    output.line(
        f"{_state(model)}, {format_bytes(model['bytes'])} in {model['tensors']} tensors, {model['leases']} leases, "
        f"{model['pins']} pins, {model['opens']} opens, readers: {readers}"
    )
    if model["fingerprint"]:
        output.line("")
        output.table(("fingerprint", "value"), sorted(model["fingerprint"].items()))
    output.line("")
    # Neighbours in the same tier share a row: a model has up to hundreds of layers, mostly in few runs.
    places = [(layer, _with_copies(model, layer, tier)) for layer, tier in model["residency"].items()]
    runs = [(tier, [layer for layer, _ in run]) for tier, run in groupby(places, lambda x: x[1])]
    rows = [(len(run), run[0] if len(run) == 1 else f"{run[0]} ... {run[-1]}", tier) for tier, run in runs]
    output.table((">layers", "from ... to", "tier"), rows)


def _with_copies(model: dict[str, Any], layer: str, tier: str) -> str:
    """Where a layer is, and how much of it is on which device too."""
    copies = [f"{format_bytes(held[layer])} on {name}" for name, held in model["replicas"].items() if layer in held]
    return tier + "".join(f", {copy}" for copy in copies)
