"""`tiermem doctor`: what this host can do and why not the rest, and whether a daemon answers. Leaves nothing behind."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tiermem import host
from tiermem.cli import doctor_remote, output
from tiermem.cli.flags import config_flags, json_flag
from tiermem.config import BY_KEY, Config, Setting, load_config, origins, socket_path
from tiermem.errors import ConfigError
from tiermem.host import Capability, Host, Storage
from tiermem.tier_spec import MEMORY_KINDS
from tiermem.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tiermem.sampler import RungState

_CONNECT_S = 1.0


@click.command()
@click.argument("directory", default=".", type=click.Path())
@click.option("--config", "show_config", is_flag=True, help="Show each option, its value and where it came from.")
@config_flags(
    "address", "tier", "backing", "listen", "peer", "tls_cert", "tls_key", "tls_ca", "insecure", "allow", "transport"
)
@json_flag
def command(directory: str, show_config: bool, as_json: bool, **flags: object) -> None:
    """Show what this host can do, and why not the rest.

    DIRECTORY is where checkpoints are, to see how they can be read.
    """
    if show_config:
        _show_config(origins(flags), as_json)
        return
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else it tells on stderr, beside us, of handshakes that failed
    config = load_config(flags)
    facts = host.probe()
    disk = host.storage(directory)
    kind, backing = _backing(config)
    daemon = _daemon(config.address)
    rungs = _rungs()
    tiers_error = _tiers_error(config, facts)
    remote = doctor_remote.examine(config)
    if as_json:
        results = {
            "facts": asdict(facts),
            "storage": asdict(disk),
            "tiers": [str(spec) for spec in config.tier],
            "tiers_error": tiers_error,
            "backing": {"kind": kind, **asdict(backing)},
            "daemon": {"address": config.address, **asdict(daemon)},
            "sampling": [{"rung": rung.name, "available": rung.available, "reason": rung.reason} for rung in rungs],
            "remote": remote,
        }
        output.emit_json("doctor", results)
    else:
        _show(facts, disk, config, kind, backing, daemon, tiers_error)
        output.line("")
        rows = [(rung.name, _mark(rung.available), rung.reason) for rung in rungs]
        output.table(("sampling by", "", "why"), rows)
        doctor_remote.show(remote)


def _rungs() -> tuple[RungState, ...]:
    """Which samplers work here, found by trying each."""
    from tiermem.sampler import ladder

    return ladder()


def _backing(config: Config) -> tuple[str, Capability]:
    """The backing that a daemon would get, found by making one and giving it up."""
    from tiermem.segment import open_backing

    with tempfile.TemporaryDirectory(prefix="tiermem-doctor-") as directory:
        try:
            made = open_backing(config.backing, Path(directory, "segments"), _memory_bytes(config))
        except ConfigError as problem:
            return config.backing, Capability(False, str(problem))
        made.close(keep=False)
        return made.kind, Capability(True, made.reason)


def _memory_bytes(config: Config) -> int:
    return sum(spec.capacity_bytes or 0 for spec in config.tier if spec.kind in MEMORY_KINDS)


def _tiers_error(config: Config, facts: Host) -> str:
    """Why this host cannot have these tiers, if so."""
    from tiermem.tier import open_tiers

    try:
        open_tiers(config.tier, facts.nodes)
    except ConfigError as problem:
        return str(problem)
    return ""


def _daemon(address: str) -> Capability:
    """Whether a daemon listens at `address`; connects and hangs up."""
    try:
        path = socket_path(address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)
            probe.connect(str(path))
    except ConfigError as problem:
        return Capability(False, str(problem))
    except OSError as problem:
        return Capability(False, f"{address}: {problem.strerror or problem}; start one with tiermem serve")
    return Capability(True, f"answers at {address}")


def _show(
    facts: Host, disk: Storage, config: Config, kind: str, backing: Capability, daemon: Capability, tiers_error: str
) -> None:
    ram = facts.memory
    limit = "" if ram.limit_bytes is None else f", limited to {format_bytes(ram.limit_bytes)}"
    output.line(f"{facts.name}, Linux {facts.kernel}")
    output.line(f"memory {format_bytes(ram.total_bytes)}, {format_bytes(ram.available_bytes)} available{limit}")
    for node in facts.nodes:
        cpus = f"CPUs {node.cpus}" if node.cpus else "no CPUs"
        sizes = f"{format_bytes(node.total_bytes)}, {format_bytes(node.free_bytes)} free"
        output.line(f"NUMA node {node.number}: {sizes}, {cpus}")
    output.line("")
    checks = facts.capabilities() | {f"files ({disk.filesystem})": disk.direct, "daemon": daemon}
    output.table(("can", "", "why"), [(name, _mark(check.available), check.reason) for name, check in checks.items()])
    output.line("")
    output.table(("segments of", "", "why"), [(kind, _mark(backing.available), backing.reason)])
    excess = "; they exceed the memory, lower --tier" if _memory_bytes(config) > ram.usable_bytes else ""
    output.line(f"tiers {', '.join(map(str, config.tier))}{excess}")
    if tiers_error:
        output.note(tiers_error)


def _mark(available: bool) -> str:
    return "yes" if available else "no"


def _show_config(settings: dict[str, Setting], as_json: bool) -> None:
    if as_json:
        rows = [{"key": key, "value": _plain(setting.value), "unit": BY_KEY[key].kind.unit, "origin": setting.origin}
                for key, setting in settings.items()]  # fmt: skip
        output.emit_json("config", rows)
        return
    text = [(key, _value_text(key, setting), setting.origin) for key, setting in settings.items()]
    output.table(("option", "value", "origin"), text)


def _value_text(key: str, setting: Setting) -> str:
    match BY_KEY[key].kind.unit:
        case "bytes":
            return format_bytes(setting.value)
        case "seconds":
            return format_seconds(setting.value)
    if isinstance(setting.value, bool):
        return str(setting.value).lower()
    return "unset" if setting.value in (None, "", ()) else str(_plain(setting.value))


def _plain(value: Any) -> Any:
    """Lists as they are written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value
