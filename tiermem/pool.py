"""Pool: the owner of weights. Ties tiers, catalog, leases, loads and the policy together under one lock.

Never speaks a protocol (the server does) and never maps weights for a reader (the model does). Blocking work (parsing,
reading, digesting) is done without the lock; what holds it is short.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from tiermem import host
from tiermem.adoption import adopt
from tiermem.catalog import Catalog, ModelRecord
from tiermem.catalog_files import CatalogFiles
from tiermem.config import Config
from tiermem.digests import DigestRecords
from tiermem.errors import Closed, ImageAbandoned, ModelNotFound, Refused, TiermemError, own
from tiermem.fingerprint import is_image
from tiermem.journal import Journal, Watcher
from tiermem.lease import Lease, LeaseTable, Opened, Session
from tiermem.load import Figures, Load, plan_checks, readiness
from tiermem.loader import Loader
from tiermem.lookup import Found, Lookup
from tiermem.memory import Memory
from tiermem.peers import Peers
from tiermem.rpc.messages import ReportRequest
from tiermem.segment import open_backing
from tiermem.source.choice import reads_of
from tiermem.spare import Spare
from tiermem.statistics import AccessStatistics
from tiermem.steering import Steering
from tiermem.tier import open_tiers
from tiermem.tiering import Tiering


class Pool:
    """A pool of this process. `embedded`: leaves no trace, and nothing outlives it."""

    def __init__(self, config: Config, embedded: bool = False) -> None:
        self.id = secrets.token_hex(8)
        self.config = config
        self.started_s = time.time()
        self.lock = threading.RLock()  # guards catalog, leases and tiers; for readers that need them to agree
        self.peers = Peers(config)
        self.tiers = open_tiers(config.tier, host.numa_nodes())
        steering = Steering(config.policy, config.policy_budget)
        try:
            directory = None if embedded else config.state / "segments"
            backing = open_backing(config.backing, directory, self.tiers.capacity_bytes)
        except BaseException:
            steering.close()
            raise
        self.memory = Memory(backing, self.tiers)
        self.catalog = Catalog()
        self.leases = LeaseTable()
        self.journal = Journal()
        self.statistics = AccessStatistics(self.journal)
        self.quarantined, self._closed = 0, False
        self.figures: dict[str, Figures] = {}
        self._digests = DigestRecords(config.digests)
        self.lookup = Lookup(self.catalog, self._digests, self.peers, self.tiers.disk, self._forget_if_idle)
        self._loads: dict[str, Load] = {}
        self.tiering = Tiering(
            steering, config.quota, self.memory, self.catalog, self.leases, self._loads, self.statistics, self.lock,
            self._forget,
        )  # fmt: skip
        self._load_ended = threading.Condition(self.lock)
        self.loader = Loader(config.read_threads, config.staging, self.lock, self._end)
        if not embedded:
            self.loader.start()
        self.files = None if embedded else CatalogFiles(config.state / "catalog", self.tiers.disk)
        if self.files is not None and backing.survives:
            self._adopt(self.files)
        self.spare = Spare(backing, config.spare, self._spare_room)
        for record in self.catalog:
            self._begin(record)
        self.tiering.start()

    # --- loading ------------------------------------------------------------------------------------------------

    def load(
        self, path: str, name: str | None = None, layers: Mapping[str, str] | None = None
    ) -> tuple[ModelRecord, Future[None]]:
        """Begin to load the checkpoint at `path`, or find it; the future ends once it is there, or with an error.

        Raises CheckpointNotFound, CheckpointError, CapacityError, or Refused where `name` is another model's.
        """
        self.tiering.steering.refresh()
        manifest = self.lookup.manifest(path, layers)
        with self.lock:
            record, _ = self.lookup.checkpoint(manifest, name)
            future = readiness(self._ensure(record), None)
        self._begin(record)
        return record, future

    def open(
        self,
        session: Session,
        path: str | None = None,
        name: str | None = None,
        layers: Mapping[str, str] | None = None,
    ) -> Opened:
        """Lease a model, by path or by name, and begin to load what is missing of it. Raises as `load` does,
        and ModelNotFound for an unknown name."""
        self.tiering.steering.refresh()
        manifest = (
            self.lookup.manifest(path, layers)
            if path is not None
            else self.lookup.elsewhere(name, self.tiering.steering.sources)
        )
        return self.lease_found(session, lambda: self.lookup.find(manifest, name))

    def lease_found(self, session: Session, find: Callable[[], Found]) -> Opened:
        """Lease what `find` finds, and begin to load what is missing of it."""
        with self.lock:
            if session.ended:
                raise Refused(f"process {session.pid} left while it opened a model")
            record, files = find()
            while (load := self._loads.get(record.id)) is not None and load.error is not None:
                # It is being given up; who opens now gets the load after it.
                self._load_ended.wait()
                record, files = find()
            lease = self.leases.grant(record.id, session)
            try:
                self._ensure(record, lease)
            except TiermemError:
                self.leases.release(lease)
                raise
            self.statistics.opened(record, lease)
            record.opens += 1
            record.last_open_s = time.time()
            record.last_used_s[:] = time.monotonic()
        self._begin(record)
        return Opened(lease, record, files)

    def when_ready(self, lease: Lease, tensors: Iterable[int] | None) -> Future[None]:
        """A future that ends when these tensors may be read, or with the load's error; None: the whole model."""
        with self.lock:
            record = self.record(lease)
            wanted = None if tensors is None else list(tensors)
            if wanted is not None:
                segments = record.segments_of(wanted)
                record.last_used_s[segments] = time.monotonic()
                self.statistics.asked(record, segments)
            future = readiness(self._ensure(record), wanted)
        self._begin(record)
        return future

    def _ensure(self, record: ModelRecord, lease: Lease | None = None) -> Load | None:
        """The load in progress of a model, made if segments are missing. Holds the lock; `_begin` must follow. That of
        an image is its draft, which the holder of the lease fills."""
        # The check of a model that was adopted in part brings nothing of the rest.
        while (load := self._loads.get(record.id)) is not None and load.is_check and record.missing():
            self._load_ended.wait()
        if self.catalog.by_id(record.id) is not record:
            raise ModelNotFound(f"{record.name} was removed meanwhile; load it again")
        if load is not None or not (missing := record.missing()):
            return load
        try:
            if self._closed:
                raise Closed("the pool is closed")
            self.loader.start()
            self.tiering.eviction.make_room(sum(record.manifest.segments[i].page_bytes for i in missing), record)
            segments = self.memory.create(record, self.tiering.places(record, missing))
        except TiermemError:
            self._forget_unloaded(record)
            raise
        tasks, source = reads_of(record, segments, self.peers, self.tiering.steering.sources)
        nodes = {tier.id: tier.node_mask for tier in self.tiers.memory}
        load = Load(record, segments, tasks, source, self.spare.stock, self.lock, self._complete, nodes)
        if is_image(record.manifest):
            load.filler, load.begun = lease, True
        self._loads[record.id] = load
        return load

    def _begin(self, record: ModelRecord) -> None:
        with self.lock:
            load = self._loads.get(record.id)
            if load is None or load.begun:
                return
            load.begun = True
        self.loader.add(load)

    def _complete(self, load: Load, segment: int) -> None:
        load.segments[segment].seal()
        self.tiering.settle(load.record, segment)
        with self.lock:
            load.record.complete(segment)

    def _end(self, load: Load) -> None:
        """The last task of a load has ended: keep all of it, or nothing."""
        record, error = load.record, load.outcome()
        with self.lock:
            del self._loads[record.id]
            self._load_ended.notify_all()
            if error is not None:
                for i in load.segments:
                    self.memory.drop(record, i)
                self.leases.fail(record.id, error)
                self.quarantined += load.is_check and record.loaded
                self._forget_unloaded(record)
            else:
                record.loaded = True
                self.figures[record.id] = figures = load.figures
                took_s = time.monotonic() - figures.started_s
                self.journal.tell("load", model=record.id, seconds=took_s, nbytes=figures.read_bytes)
        if error is None and not load.is_check:
            self._digests.put(record.manifest, [digest or b"" for digest in record.digests])
        self._persist(record)
        self.spare.refill()
        load.end(error)

    # --- leases ---------------------------------------------------------------------------------------------------

    def record(self, lease: Lease) -> ModelRecord:
        """The leased model. Raises the error of the load that the lease is for, even if a later one succeeded."""
        with self.lock:
            if lease.error is not None:
                raise own(lease.error)
            record = self.catalog.by_id(lease.model_id)
            if record is None:
                raise ModelNotFound("the model was removed; load it again")
            return record

    def draft_of(self, lease: Lease) -> Load | None:
        """The load of an image that the lease's holder is to fill. Holds the lock."""
        load = self._loads.get(lease.model_id)
        return load if load is not None and load.filler is lease else None

    def share(self, lease: Lease, segments: Iterable[int]) -> list[int]:
        """New descriptors of the model's segments, for the caller to send and close: read-only, but for who fills."""
        with self.lock:
            return self.memory.share(self.record(lease), segments, lend=self.draft_of(lease) is not None)

    def release(self, lease: Lease) -> None:
        """End a lease."""
        with self.lock:
            if not self.leases.release(lease):
                return
            self.statistics.released(lease)
            self.tiering.migrator.replicas.released(lease)
            if (draft := self.draft_of(lease)) is None:
                return
            left = f"process {lease.session.pid} left before it had filled {draft.record.name}; create it anew"
            draft.fail(ImageAbandoned(left))
        self.loader.add(draft)

    def end_session(self, session: Session) -> None:
        """A client went: all its leases end."""
        with self.lock:
            session.ended = True
            for lease in self.leases.of_session(session):
                self.release(lease)

    def announce(self, session: Session, lease_id: str, model_id: str) -> bool:
        """Take over a lease that a client held from an earlier daemon; False where the model was not adopted."""
        with self.lock:
            record = self.catalog.by_id(model_id)
            if record is None or record.missing():
                return False
            self.statistics.opened(record, self.leases.grant(model_id, session, lease_id))
            return True

    def report(self, session: Session, request: ReportRequest) -> None:
        """Take what a client's agent saw. Raises ProtocolError for what no agent can have seen."""
        with self.lock:
            held = {lease.id: (record, lease) for lease in self.leases.of_session(session)
                    if (record := self.catalog.by_id(lease.model_id))}  # fmt: skip
            self.statistics.reported(session.pid, held, request)

    def watch(self, wake: Callable[[], object]) -> Watcher:
        """Follow the journal from now on, beginning with what is open and mapped."""
        with self.lock:
            return self.journal.watch(wake, self.statistics.state(self.catalog, self.leases))

    def lease(self, session: Session, lease_id: str) -> Lease:
        """The session's lease of that id. Raises Refused."""
        with self.lock:
            return self.leases.get(lease_id, session)

    # --- what users ask for ------------------------------------------------------------------------------------

    def pin(self, name: str, by: int = 1) -> int:
        """Promise not to evict a model; returns its pins."""
        with self.lock:
            record = self.catalog.named(name)
            if record.pins + by < 0:
                raise Refused(f"{name} is not pinned")
            record.pins += by
        self._persist(record)
        return record.pins

    def unpin(self, name: str) -> int:
        return self.pin(name, -1)

    def evict(self, name: str) -> int:
        """Take a model out of memory; it stays known, and an open brings it back. Returns bytes freed."""
        with self.lock:
            record = self.catalog.named(name)
            freed = self.tiering.evict(record)
        self._persist(record)
        self.spare.refill()
        return freed

    def remove(self, name: str) -> int:
        """Forget a model and free its memory. A load in progress is given up. Returns bytes freed."""
        with self.lock:
            record = self.catalog.named(name)
            freed = record.resident_bytes()
        while (load := self._give_up(record)) is not None:
            self.loader.settle(load)
            load.finished.exception()
        self.spare.refill()
        return freed

    def loads(self) -> dict[str, Load]:
        """Loads in progress by model id."""
        with self.lock:
            return dict(self._loads)

    def check(self) -> None:
        """Every structure agrees with every other."""
        with self.lock:
            self.catalog.check()
            self.leases.check()
            self.tiering.check()
            self.statistics.check()

    def close(self) -> None:
        """End everything. Segments stay for the next daemon where the configuration says `keep`."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
        self.tiering.close()
        self.loader.close()
        self.peers.close()
        self.spare.close()
        keep = self.config.keep and self.memory.backing.survives
        if self.files is not None and not keep:
            for record in self.catalog:
                self.files.remove(record.id)
        self.memory.close(keep)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _give_up(self, record: ModelRecord) -> Load | None:
        """Forget a model, or stop the load that has to end before; returns that load: another may begin meanwhile."""
        with self.lock:
            if self.catalog.by_id(record.id) is not record:
                return None
            self.tiering.eviction.refuse_if_held(record)
            load = self._loads.get(record.id)
            if load is None:
                self._forget(record)
            else:
                load.fail(Refused(f"{record.name} was unloaded while it was loading"))
            return load

    def _forget_unloaded(self, record: ModelRecord) -> None:
        """A model whose first load failed leaves nothing behind, nor does an image that cannot be read again."""
        if not record.loaded or is_image(record.manifest):
            self._forget(record)

    def _forget_if_idle(self, record: ModelRecord) -> None:
        if not (self.leases.holders(record.id) or record.pins or record.id in self._loads):
            self._forget(record)

    def _forget(self, record: ModelRecord) -> None:
        self.memory.drop_all(record)
        self.tiering.migrator.replicas.forget(record)
        self.catalog.remove(record)
        self.statistics.forget(record)
        self.figures.pop(record.id, None)
        if self.files is not None:
            self.files.remove(record.id)

    def _persist(self, record: ModelRecord) -> None:
        if self.files is not None:
            self.files.sync(record.id, lambda: self.catalog.by_id(record.id))

    def _adopt(self, files: CatalogFiles) -> None:
        for record, segments in adopt(files, self.memory):
            record.name = self.catalog.free_name(record.name, record.id)
            self.catalog.add(record)
            if is_image(record.manifest) and record.missing():
                self._forget(record)
            elif segments:
                tasks = plan_checks(record, segments)
                self._loads[record.id] = Load(record, segments, tasks, None, None, self.lock, self._complete)
                self.tiering.eviction.hold_until_s = time.monotonic() + self.config.grace

    def _spare_room(self) -> int:
        with self.lock:
            return 0 if self._loads else self.tiers.memory[0].free_bytes or 0
