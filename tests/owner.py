"""Owner: a pool in this process that listens for peers on the loopback, and sessions with it. Leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from tests.certificates import Certificate
from tests.conftest import until
from tiermem.catalog import ModelRecord
from tiermem.config import Config, load_config
from tiermem.peer.address import Address
from tiermem.peer.remote import RemotePool
from tiermem.peer.tls import Tls, open_tls
from tiermem.peer_listener import serve_peers
from tiermem.pool import Pool

T = TypeVar("T")


class Loop:
    """An event loop on a thread of its own. One for all tests of a process: gRPC's loops wake each other in vain."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="tests-loop")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Owner:
    """Started when constructed. `config` makes its configuration, which listens at a free port."""

    def __init__(self, loop: Loop, config: Callable[..., Config], certificate: Certificate | None, **options: object):
        made = config(listen="127.0.0.1:0", **(certificate.options if certificate else {}), **options)
        self._loop, self._ending = loop, AsyncExitStack()
        self.pool = Pool(made)
        try:
            listener = loop.run(serve_peers(self.pool, made, self._ending))
        except BaseException:
            self.pool.close()
            raise
        assert listener is not None
        self.address: Address = listener

    def load(self, path: Path, name: str | None = None) -> ModelRecord:
        record, loaded = self.pool.load(str(path), name)
        loaded.result(20)
        return record

    def connect(self, certificate: Certificate | None = None) -> RemotePool:
        """A session as the pool of that certificate has it."""
        return RemotePool(self.address, certificate and tls_of(certificate))

    def close(self) -> None:
        """Fails unless the sessions' leases end with them."""
        try:
            until(lambda: len(self.pool.leases) == 0)
            self._loop.run(self._ending.aclose())
            self.pool.check()
        finally:
            self.pool.close()


def tls_of(certificate: Certificate) -> Tls:
    tls = open_tls(load_config(certificate.options, {"HOME": "/"}, ()))
    assert tls is not None
    return tls
