"""Lookup: the record that a path, a manifest or a name means, made where there is none. Guarded by the pool's lock.

Owns what is known of paths. Never loads, and never forgets a model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from tiermem.catalog import Catalog, ModelRecord
from tiermem.digests import DigestRecords
from tiermem.errors import Refused
from tiermem.paths import KnownPaths, default_name
from tiermem.peer.address import is_remote
from tiermem.peers import Peers
from tiermem.policy import PEER
from tiermem.types import Manifest

Found = tuple[ModelRecord, tuple[int, ...] | None]
"""A record, and which of its files were meant (None: all)."""


class Lookup:
    """Of one catalog. `disk` is the id of its last tier; `forget_if_idle(record)` makes room for a successor."""

    def __init__(
        self,
        catalog: Catalog,
        digests: DigestRecords,
        peers: Peers,
        disk: int,
        forget_if_idle: Callable[[ModelRecord], None],
    ) -> None:
        self._catalog, self._digests, self._disk, self._forget_if_idle = catalog, digests, disk, forget_if_idle
        self._peers = peers
        self._paths = KnownPaths()

    def manifest(self, path: str, layers: Mapping[str, str] | None) -> Manifest:
        """Of a checkpoint here, or of a model at a peer. The lock must not be held. Raises CheckpointNotFound,
        CheckpointError; ModelNotFound, DaemonUnreachable, AccessDenied for a peer's."""
        return self._peers.manifest(path) if is_remote(path) else self._paths.manifest(path, layers)

    def elsewhere(self, name: str | None, sources: Collection[str]) -> Manifest | None:
        """Of the model that a peer has under a name that this pool does not know, if peers are among the sources. The
        lock must not be held."""
        unknown = name is not None and not self._catalog.knows(name)
        return self._peers.find(name) if name is not None and unknown and PEER in sources else None

    def find(self, manifest: Manifest | None, name: str | None) -> Found:
        """The model of a checkpoint, or without one that of the name. Raises ModelNotFound, Refused."""
        return (self._catalog.named(name or ""), None) if manifest is None else self.checkpoint(manifest, name)

    def checkpoint(self, manifest: Manifest, name: str | None) -> Found:
        """The model of a checkpoint; made under that name where there is none. Raises Refused for another's name."""
        found = self._catalog.find(manifest)
        if found is not None:
            if name is not None and found[0].name != name:
                raise Refused(f"{manifest.path} is in the pool as {found[0].name!r}; open it by that name or its path")
            return found
        # A model of the same path is of files that are no longer there.
        for old in [r for r in self._catalog if r.manifest.path == manifest.path and name in (None, r.name)]:
            self._forget_if_idle(old)
        known = self._digests.get(manifest)
        return self._made(manifest, name or self._free(default_name(manifest), manifest), known), None

    def image(self, manifest: Manifest, name: str | None) -> Found:
        """The image of that fingerprint; made where there is none, if it can be under that name."""
        record = self._catalog.by_id(manifest.identity)
        return record or self._made(manifest, self._free(name or manifest.path, manifest), None), None

    def _free(self, wanted: str, manifest: Manifest) -> str:
        return self._catalog.free_name(wanted, manifest.identity)

    def _made(self, manifest: Manifest, name: str, digests: list[bytes | None] | None) -> ModelRecord:
        record = ModelRecord(name, manifest, digests or [None] * len(manifest.tensors), self._disk)
        self._catalog.add(record)
        return record
