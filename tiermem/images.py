"""Images: weights in one engine's final layout. A client creates one, fills it and seals it; others find it.

An image is a model of the catalog without a checkpoint: leased, counted, moved and listed like any other, but gone once
it leaves memory. Until it is sealed it is a draft: a load whose bytes its creator writes. The creator's death, or its
release, ends the draft, and nothing stays of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future

from tiermem.catalog import ModelRecord
from tiermem.errors import CapacityError, FingerprintMismatch, ImageNotFound, Refused
from tiermem.fingerprint import differences, fingerprint_of, identity_of, is_image, manifest_of
from tiermem.lease import Lease, Opened, Session
from tiermem.lookup import Found
from tiermem.pool import Pool
from tiermem.types import ImageTensor
from tiermem.units import format_bytes


class Images:
    """Of one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def create(
        self,
        session: Session,
        fingerprint: Mapping[str, str],
        tensors: Iterable[ImageTensor],
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[Opened, bool]:
        """Lease the image of that fingerprint, and whether it is empty: then the caller is to fill and seal it.

        Raises ProtocolError for what is no image, and CapacityError.
        """
        pool = self._pool
        manifest = manifest_of(fingerprint, tensors, metadata)
        most = pool.tiers.capacity_bytes
        if manifest.page_bytes > most:  # before a record of that many pages is made
            needed = format_bytes(manifest.page_bytes)
            raise CapacityError(
                f"{name or manifest.path} needs {needed}, all memory is {format_bytes(most)}; raise --tier"
            )
        pool.tiering.steering.refresh()
        opened = pool.lease_found(session, lambda: pool.lookup.image(manifest, name))
        with pool.lock:
            draft = pool.draft_of(opened.lease)
            if draft is None:
                return opened, False
            draft.in_flight += 1  # memory is not dropped under the threads that prefault it
        try:
            draft.prefault(pool.config.read_threads)
        except BaseException:
            pool.release(opened.lease)
            raise
        finally:
            with pool.lock:
                draft.in_flight -= 1
            pool.loader.settle(draft)
        return opened, True

    def seal(self, lease: Lease) -> Future[None]:
        """Keep what the holder of the lease filled; the future ends once it is digested. Raises Refused."""
        with self._pool.lock:
            draft = self._pool.draft_of(lease)
            if draft is None:
                raise Refused("the lease is not of an image that is being filled; create the image first")
            draft.filler = None
        self._pool.loader.add(draft)
        return draft.finished

    def open(self, session: Session, fingerprint: Mapping[str, str], name: str | None = None) -> Opened:
        """Lease the image of that fingerprint. With a `name` it must be that one.

        Raises ImageNotFound, and FingerprintMismatch where the image of the name has another fingerprint.
        """

        def find() -> Found:
            return (self._find(fingerprint) if name is None else self._named(fingerprint, name)), None

        return self._pool.lease_found(session, find)

    def _find(self, fingerprint: Mapping[str, str]) -> ModelRecord:
        record = self._pool.catalog.by_id(identity_of(fingerprint))
        if record is not None:
            return record
        others = [other for other in self._pool.catalog if is_image(other.manifest)]
        told = [(differences(fingerprint, fingerprint_of(other.manifest)), other.name) for other in others]
        if not told:
            raise ImageNotFound("the pool holds no image yet; create this one")
        fields, nearest = min(told, key=lambda pair: len(pair[0]))
        raise ImageNotFound(f"no image has this fingerprint (in {nearest!r} {_listed(fields)}); create this one")

    def _named(self, fingerprint: Mapping[str, str], name: str) -> ModelRecord:
        record = self._pool.catalog.named(name)
        if not is_image(record.manifest):
            raise FingerprintMismatch(f"{name!r} is the model of {record.manifest.path}, no image; name an image")
        if record.id != identity_of(fingerprint):
            fields = _listed(differences(fingerprint, fingerprint_of(record.manifest)))
            raise FingerprintMismatch(f"image {name!r} does not fit: {fields}; leave the name out to have one made")
        return record


def _listed(fields: list[str]) -> str:
    return ", ".join(fields[:5]) + (f" and {len(fields) - 5} more" if len(fields) > 5 else "")
