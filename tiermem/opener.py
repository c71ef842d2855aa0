"""Opener: opens and waits of callers over the wire, who may give up meanwhile. Never decides what is opened.

What blocks runs on threads; a lease that its caller will not learn of is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from tiermem.catalog import ModelRecord
from tiermem.errors import DeadlineExceeded
from tiermem.lease import Opened
from tiermem.pool import Pool
from tiermem.rpc.codec import encode_manifest
from tiermem.units import format_seconds

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Opener:
    """Of one pool, on some threads. Each manifest is encoded once."""

    def __init__(self, pool: Pool, threads: ThreadPoolExecutor) -> None:
        self._manifests: WeakKeyDictionary[ModelRecord, bytes] = WeakKeyDictionary()
        self._pool, self._threads = pool, threads

    async def open(self, open_: Callable[[], tuple[Opened, bool]]) -> tuple[Opened, bytes, bool]:
        """What `open_` opened, its model's manifest encoded, and whether it is a draft."""
        opening = self._threads.submit(open_)
        try:
            opened, draft = await asyncio.wrap_future(opening)
            encoded = self._manifests.get(opened.record)
            if encoded is None:
                encoded = await self.blocking(encode_manifest, opened.record.manifest)
                self._manifests[opened.record] = encoded
        except BaseException:
            # The caller will not learn of the lease: it gave up waiting, or its manifest cannot be sent.
            opening.add_done_callback(self._unopened)
            raise
        return opened, encoded, draft

    async def blocking(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The result of a call that may block."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: call(*args, **kwargs))

    def _unopened(self, opening: Future[tuple[Opened, bool]]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._pool.release(opening.result()[0].lease)


async def until_ready(future: Future[None], timeout_s: float | None) -> None:
    """Wait for tensors. Raises the error of their load, or DeadlineExceeded."""
    try:
        # Shielded: the future is everyone's who waits for this load.
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), timeout_s)
    except TimeoutError:
        if not future.done():
            given = format_seconds(timeout_s or 0)
            raise DeadlineExceeded(f"the tensors were not loaded within {given}; wait longer") from None
        future.result()


def ready_bits(record: ModelRecord) -> bytes:
    """Bit i (little-endian bit order): tensor i may be read."""
    return np.packbits(record.ready, bitorder="little").tobytes()
