"""Embedded pool: the client's interface over a pool of this very process, for hosts and programs without a daemon.

Same code as a daemon's pool, less sockets; nothing of it outlives the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem._native import Range
from tiermem.agent import Agent
from tiermem.carrier import Carrier, Link
from tiermem.carrying import Carrying
from tiermem.config import Config, load_config
from tiermem.draft import Draft, usable
from tiermem.errors import Closed, DeadlineExceeded, Refused
from tiermem.images import Images
from tiermem.lease import Lease, Opened, Session
from tiermem.model import Model
from tiermem.observer import own_order
from tiermem.paths import absolute, path_or_name_of
from tiermem.pool import Pool
from tiermem.reporting import Reporting
from tiermem.rpc.messages import MoveEntry
from tiermem.sampler.client import member_of
from tiermem.statistics import ModelHeat
from tiermem.status import heat_of, moves_of, paths_of, residency_of, status_of
from tiermem.types import PAGE_BYTES, ImageTensor
from tiermem.units import format_seconds


class EmbeddedPool:
    """A pool owned by this process. `transient`: a model leaves memory with its last reader."""

    def __init__(self, config: Config | None = None, *, transient: bool = False) -> None:
        self._pool = Pool(config or load_config(), embedded=True)
        self._images = Images(self._pool)
        self._session = Session(os.getpid(), os.geteuid())
        self._reporting = Reporting(lambda request: self._pool.report(self._session, request))
        order = own_order(self._pool.config)
        self._pool.statistics.rung, self._pool.statistics.reason = order.rung, "this process looks at its own pages"
        self._reporting.obey(order)
        self._carrying = Carrying(partial(self._pool.tiering.report, self._session), lambda do: self._agent.submit(do))
        self._agent = Agent("tiermem-agent", self._reporting, self._carrying)
        self._session.give = lambda order: self._agent.submit(partial(self._carrying.obey, order))
        self._transient = transient
        self._closed = False

    def open(
        self,
        path_or_name: str | os.PathLike[str],
        *,
        writable: bool = False,
        layers: Mapping[str, str] | None = None,
    ) -> Model:
        """Lease the model of a checkpoint path, or of a name in this pool, and begin to load what is missing.

        Raises CheckpointNotFound, ModelNotFound, CheckpointError, CapacityError.
        """
        path, name = path_or_name_of(path_or_name)
        opened = self._live().open(self._session, path=path, name=name, layers=layers)
        return Model(_Holder(self, opened), writable)

    def create_image(
        self,
        fingerprint: Mapping[str, str],
        tensors: Iterable[ImageTensor],
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Draft | Model:
        """As `Client.create_image`: a Draft to fill and seal, or a Model where the image exists."""
        listed = tuple(tensors)

        def create() -> Draft | Model:
            self._live()
            opened, draft = self._images.create(self._session, fingerprint, listed, name, metadata)
            holder = _Holder(self, opened)
            return Draft(holder, lambda: self._images.seal(opened.lease).result()) if draft else Model(holder)

        return usable(create, timeout_s)

    def open_image(self, fingerprint: Mapping[str, str], *, name: str | None = None, writable: bool = False) -> Model:
        """As `Client.open_image`. Raises ImageNotFound, FingerprintMismatch."""

        def find() -> Model:
            self._live()
            return Model(_Holder(self, self._images.open(self._session, fingerprint, name)), writable)

        return usable(find)

    def share_paths(self, name: str) -> tuple[str, ...]:
        """Path of each segment's file of a model. Raises ModelNotFound, Refused."""
        return paths_of(self._live(), name)

    def load(
        self, path: str | os.PathLike[str], name: str | None = None, *, layers: Mapping[str, str] | None = None
    ) -> str:
        """Load a whole checkpoint; returns the model's name when it is resident."""
        record, loaded = self._live().load(absolute(path), name, layers)
        loaded.result()
        return record.name

    def pin(self, name: str) -> int:
        """Promise not to evict a model; returns its pins."""
        return self._live().pin(name)

    def unpin(self, name: str) -> int:
        """Take one pin back; returns the pins left."""
        return self._live().unpin(name)

    def evict(self, name: str) -> int:
        """Take a model out of memory; returns bytes freed. Raises Refused while it is leased or pinned."""
        self._agent.settle()  # what this process closed just now does not stand in the way
        return self._live().evict(name)

    def remove(self, name: str) -> int:
        """Forget a model; returns bytes freed. Raises Refused while it is leased or pinned."""
        self._agent.settle()  # what this process closed just now does not stand in the way
        return self._live().remove(name)

    def status(self, name: str | None = None) -> dict[str, Any]:
        """Tiers, models, loads and leases as plain data."""
        return status_of(self._live(), name)

    def heat(self, name: str) -> ModelHeat:
        """What was observed of each page of a model. Raises ModelNotFound."""
        return heat_of(self._live(), name)

    def set_policy(self, name: str) -> tuple[str, ...]:
        """Put a policy in charge: a shipped one by name, or a file; returns what is odd about it.

        Raises ConfigError where it cannot be loaded; the old one stays then.
        """
        return tuple(self._live().tiering.steering.set(name))

    def policy_log(self, model: str | None = None, page: int | None = None, limit: int = 1000) -> tuple[MoveEntry, ...]:
        """The latest moves and refusals, newest first: all, of a model, or of one page of it. Raises ModelNotFound."""
        return moves_of(self._live(), model, page, limit)

    def close(self) -> None:
        """End the pool. Arrays that were taken stay valid."""
        if not self._closed:
            self._closed = True
            self._agent.close()
            self._pool.close()

    def __enter__(self) -> EmbeddedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _live(self) -> Pool:
        if self._closed:
            raise Closed("the embedded pool is closed")
        return self._pool

    def _release(self, lease: Lease) -> None:
        self._agent.submit(partial(self._end_lease, lease))

    def _mapped(self, lease: Lease, mapping: Range) -> None:
        member = member_of(lease.id, mapping, mapping.nbytes // PAGE_BYTES)
        self._agent.submit(partial(self._reporting.add, lease.id, member, time.monotonic()))

    def _end_lease(self, lease: Lease) -> None:
        self._reporting.remove(lease.id)
        self._carrying.remove(lease.id)
        self._pool.release(lease)
        if self._transient:
            record = self._pool.catalog.by_id(lease.model_id)
            if record is not None:
                try:
                    self._pool.remove(record.name)
                except Refused:
                    return


class _Holder:
    """A lease on a model of an embedded pool."""

    def __init__(self, owner: EmbeddedPool, opened: Opened) -> None:
        record = opened.record
        self.name = record.name
        self.model_id = record.id
        self.manifest = record.manifest
        self.files = opened.files
        self.ready: npt.NDArray[np.bool_] = record.ready.copy()
        self._owner = owner
        self._pool = owner._live()
        self._opened = opened

    def descriptors(self, segments: Sequence[int]) -> dict[int, int]:
        return dict(zip(segments, self._pool.share(self._opened.lease, segments), strict=True))

    def wait(self, tensors: Sequence[int] | None, timeout_s: float | None) -> None:
        future = self._pool.when_ready(self._opened.lease, tensors)
        try:
            future.result(timeout_s)
        except FutureTimeout:
            if not future.done():
                raise DeadlineExceeded(f"{self.name} was not loaded within {format_seconds(timeout_s or 0)}") from None
            future.result()

    def residency(self) -> dict[str, str]:
        return residency_of(self._pool, self._opened.record)

    def mapped(self, mapping: Range) -> None:
        self._owner._mapped(self._opened.lease, mapping)

    def pinned(self, pages: Sequence[int]) -> None:
        owner = self._owner
        owner._agent.submit(partial(owner._reporting.mark_pinned, self._opened.lease.id, pages))

    def carry(self, carrier: Carrier) -> Link:
        return self._owner._carrying.add(self._opened.lease.id, carrier)

    def digests(self) -> list[bytes | None]:
        return list(self._pool.record(self._opened.lease).digests)

    def release(self) -> None:
        self._owner._release(self._opened.lease)
