"""Peer listener: the ports by which other hosts' pools reach this one, and what lets them read its memory by RDMA.

Opens all of it together and closes it together. Answers nobody itself: the peer service and the data server do.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from functools import partial
from threading import Event, Thread

from tiermem.config import Config
from tiermem.errors import ConfigError, TransportUnavailable
from tiermem.peer.access import Access
from tiermem.peer.address import Address
from tiermem.peer.grants import Grants
from tiermem.peer.rdma_exporter import Exporter
from tiermem.peer.sender import DataServer, Limits
from tiermem.peer_service import PeerService
from tiermem.pool import Pool
from tiermem.rpc.server import create_peer_server, peer_credentials

_STOP_GRACE_S = 1.0
_PINNED_IDLE_S = 10.0
"""How long memory stays pinned for RDMA that nobody reads any more; less where a load needs its room."""

_log = logging.getLogger(__name__)


async def serve_peers(pool: Pool, config: Config, ending: AsyncExitStack) -> Address | None:
    """Listen for peers until `ending`, where the configuration says so; there. Raises ConfigError, Refused for a data
    port that is taken."""
    if config.listen is None:
        return None
    grants, loop, tls = Grants(), asyncio.get_running_loop(), pool.peers.own_tls
    service = PeerService(pool, Access(config.allow), grants, certified=tls is not None, fetches=config.peer_fetches)
    ending.callback(service.close)
    limits = Limits(connections=config.peer_connections)
    context = None if tls is None else lambda: tls.server
    data = DataServer(grants, service.descriptor, service.available, context, limits)
    ending.push_async_callback(loop.run_in_executor, None, data.stop)
    service.data_port = await loop.run_in_executor(None, data.start, config.listen.host, config.data_port)
    service.exporter = await loop.run_in_executor(None, _open_exporter, pool, ending)
    control = create_peer_server(service, service.session_of, config.peer_connections)
    try:
        if tls is None:
            port = control.add_insecure_port(str(config.listen))
        else:
            port = control.add_secure_port(str(config.listen), peer_credentials(lambda: tls.pem))
    except RuntimeError as error:
        # gRPC does not say why; the data port listens at the host already.
        reason = "the port is taken, or not for this user"
        raise ConfigError(f"cannot listen at {config.listen}: {reason}; choose another --listen") from error
    ending.push_async_callback(control.stop, _STOP_GRACE_S)
    await control.start()
    listener = Address(config.listen.host, port)
    pool.peers.listener, pool.peers.own_id = listener, pool.id
    pool.peers.sent, pool.peers.guests = data.figures, service.guests
    how = f"by TLS, as {tls.name}" if tls is not None else "in the clear"
    _log.info("listening for peers at %s %s; weights leave by port %d", listener, how, service.data_port)
    return listener


def _open_exporter(pool: Pool, ending: AsyncExitStack) -> Exporter | None:
    """What lets others read this pool's memory by RDMA, until `ending`; None where this host cannot."""
    try:
        exporter = Exporter(pool.peers.transports.device(), _PINNED_IDLE_S, pool.memory.pins.mark)
    except TransportUnavailable as lacking:
        _log.info("weights leave by TCP: %s", lacking)
        return None
    pool.memory.pins.release_idle = partial(exporter.sweep, 0.0)
    pool.memory.pins.revoke = exporter.revoke
    pool.peers.exports = exporter.figures
    stop = Event()
    ending.callback(exporter.close)
    ending.callback(stop.set)

    def sweep() -> None:
        while not stop.wait(1.0):
            exporter.sweep()

    Thread(target=sweep, name="tiermem-unpin", daemon=True).start()
    return exporter
