"""Doctor's part on other hosts' pools: the TLS files, whether each configured peer answers, and the transport.

Makes sessions with peers and ends them at once. Asks nobody for a model, and listens nowhere.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tiermem.cli import output
from tiermem.config import Config
from tiermem.errors import ConfigError, TiermemError
from tiermem.host import Capability
from tiermem.peer.tls import Tls, check_clear, open_tls
from tiermem.peer.transport import Transports, pyverbs
from tiermem.units import format_seconds

if TYPE_CHECKING:
    from tiermem.peer.address import Address


def examine(config: Config) -> dict[str, Any]:
    """What `--json` has under `remote`."""
    tls, files = _tls(config)
    transports = Transports(config.transport)
    chosen = transports.own()
    transports.close()
    return {
        "listen": str(config.listen or ""),
        "tls": asdict(files),
        "tls_faults": [] if tls is None else tls.faults(),
        "peers": [{"address": str(a), **asdict(answer)} for a, answer in _ask(config, tls)],
        "pyverbs": asdict(pyverbs()),
        "transport": asdict(chosen),
    }


def show(found: dict[str, Any]) -> None:
    """The table of what `examine` found."""
    listening = f"listens at {found['listen']}" if found["listen"] else "--listen is not given: it lends to nobody"
    rows = [("listen", _mark(bool(found["listen"])), listening), ("tls", *_cells(found["tls"]))]
    rows += [(f"peer {peer['address']}", *_cells(peer)) for peer in found["peers"]]
    rows.append(("pyverbs", *_cells(found["pyverbs"])))
    rows.append(("transport", found["transport"]["name"], found["transport"]["reason"]))
    output.line("")
    output.table(("other hosts' pools", "", "why"), rows)
    for fault in found["tls_faults"]:
        output.note(fault)


def _cells(check: dict[str, Any]) -> tuple[str, str]:
    return _mark(check["available"]), check["reason"]


def _mark(available: bool) -> str:
    return "yes" if available else "no"


def _tls(config: Config) -> tuple[Tls | None, Capability]:
    """The TLS that the configuration names, and whether a daemon would start with it."""
    try:
        tls = open_tls(config)
    except ConfigError as problem:
        return None, Capability(False, str(problem))
    if tls is not None:
        return tls, Capability(True, f"both ways, as {tls.name}")
    where = "with any host, for --insecure is given" if config.insecure else "with pools of this host alone"
    return None, Capability(False, f"--tls-cert, --tls-key and --tls-ca are not given: in the clear, {where}")


def _ask(config: Config, tls: Tls | None) -> list[tuple[Address, Capability]]:
    """Each configured peer, all at once, and whether it begins a session with this host."""
    if not config.peer:
        return []
    with ThreadPoolExecutor(len(config.peer)) as threads:
        return list(zip(config.peer, threads.map(lambda a: _answer(a, tls, config.insecure), config.peer), strict=True))


def _answer(address: Address, tls: Tls | None, insecure: bool) -> Capability:
    from tiermem.peer.remote import RemotePool

    begin = time.monotonic()
    try:
        check_clear(address, tls, insecure)
        with RemotePool(address, tls) as pool:
            return Capability(True, f"pool {pool.id} answers within {format_seconds(time.monotonic() - begin)}")
    except TiermemError as problem:
        return Capability(False, str(problem))
