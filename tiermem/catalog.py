"""Catalog: model -> tensor -> extent, and page -> residency. Pure state with one owner, the pool; checks itself.

Never does I/O and never allocates: it is told what happened, and says what is where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiermem.content import content_of
from tiermem.errors import DigestMismatch, ModelNotFound, ProtocolError, Refused
from tiermem.fingerprint import is_image
from tiermem.peer.address import is_remote
from tiermem.types import LOADING, Manifest

FileIdentity = tuple[int, int, int, int, str]


@dataclass(slots=True, eq=False, weakref_slot=True)
class ModelRecord:
    """What the pool knows of one model. Arrays are indexed by tensor, segment or page number within the model.

    `disk` is the id of the last tier. `placed`: the tier that counts each page; `residency` is the same, but LOADING
    until the segment is whole. `replicas`: bit t, tier t has a copy. `loaded`: it was whole once, so it stays known
    when its bytes leave memory. `first_id` is what the policy calls its first page.
    """

    name: str
    manifest: Manifest
    digests: list[bytes | None]
    disk: int = 1
    ready: npt.NDArray[np.bool_] = field(init=False)
    keys: list[str | None] = field(init=False)
    last_used_s: npt.NDArray[np.float64] = field(init=False)
    residency: npt.NDArray[np.int8] = field(init=False)
    placed: npt.NDArray[np.int8] = field(init=False)
    replicas: npt.NDArray[np.uint8] = field(init=False)
    first_page: list[int] = field(init=False)
    tensors_of: list[list[int]] = field(init=False)
    loaded: bool = False
    pins: int = 0
    opens: int = 0
    last_open_s: float = 0.0
    generation: int = 0
    first_id: int = 0
    _content: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        segments = self.manifest.segments
        self.ready = np.zeros(len(self.manifest.tensors), np.bool_)
        self.keys = [None] * len(segments)
        self.last_used_s = np.zeros(len(segments))
        pages = [0]
        for segment in segments:
            pages.append(pages[-1] + segment.pages)
        self.first_page = pages
        self.residency = np.full(pages[-1], self.disk, np.int8)
        self.placed = self.residency.copy()
        self.replicas = np.zeros(pages[-1], np.uint8)
        self.tensors_of = [[] for _ in segments]
        for i, tensor in enumerate(self.manifest.tensors):
            self.tensors_of[tensor.extent.segment].append(i)

    @property
    def id(self) -> str:
        return self.manifest.identity

    def pages(self, segment: int) -> slice:
        """Page numbers of a segment."""
        return slice(self.first_page[segment], self.first_page[segment + 1])

    def segments_of(self, tensors: Sequence[int]) -> list[int]:
        """Segment of each of these tensors. Raises ProtocolError for a number that is no tensor's."""
        for i in tensors:
            if not 0 <= i < len(self.manifest.tensors):
                raise ProtocolError(f"{self.name} has {len(self.manifest.tensors)} tensors, none is number {i}")
        return [self.manifest.tensors[i].extent.segment for i in tensors]

    def new_key(self, segment: int) -> str:
        """A file name for a segment that no earlier one of this model had."""
        self.generation += 1
        return f"{self.id[:16]}-{segment:05d}-{self.generation}"

    def missing(self) -> list[int]:
        """Segments without a file: nothing of them is in memory or on its way."""
        return [i for i, key in enumerate(self.keys) if key is None]

    def begin(self, segment: int, key: str, placed: npt.NDArray[np.int8]) -> None:
        """A segment file exists and is being filled, with pages of these tiers."""
        self.keys[segment] = key
        self.placed[self.pages(segment)] = placed
        self.residency[self.pages(segment)] = LOADING

    def complete(self, segment: int) -> None:
        """Every tensor of the segment is there."""
        pages = self.pages(segment)
        self.residency[pages] = self.placed[pages]

    def place(self, pages: slice | npt.NDArray[np.integer], tiers: npt.NDArray[np.int8] | int) -> None:
        """These pages are in these memory tiers now."""
        self.placed[pages] = tiers
        self.residency[pages] = np.where(self.residency[pages] == LOADING, LOADING, self.placed[pages])

    def content(self) -> str | None:
        """What hosts that have the same weights have in common; None until every digest is known."""
        if self._content is None:
            self._content = content_of(self.manifest, self.digests)
        return self._content

    def promise(self, digests: Mapping[int, bytes | None]) -> None:
        """Tensors must have these digests when they come. Raises DigestMismatch where others are on record, and Refused
        for a tensor without one."""
        for i, digest in digests.items():
            known = self.digests[i]
            if digest is None:
                raise Refused(f"{self.name}: no digest of tensor {self.manifest.tensors[i].name!r} was given")
            if known is not None and known != digest:
                raise DigestMismatch(
                    f"{self.name}: tensor {self.manifest.tensors[i].name!r} is promised with digest "
                    f"{digest.hex()[:16]}, {known.hex()[:16]} is on record: its weights changed at the peer; load it "
                    "under another name"
                )
            self.digests[i] = digest

    def drop(self, segment: int) -> str:
        """The segment's bytes leave memory; returns the key that its file had."""
        key = self.keys[segment]
        assert key is not None, f"{self.name}: segment {segment} is not in memory"
        self.keys[segment] = None
        self.ready[self.tensors_of[segment]] = False
        pages = self.pages(segment)
        self.residency[pages] = self.placed[pages] = self.disk
        return key

    def resident(self, segment: int) -> bool:
        codes = self.residency[self.pages(segment)]
        return bool(((codes != LOADING) & (codes != self.disk)).all())

    def resident_bytes(self) -> int:
        """Bytes of whole pages in memory, complete or on their way."""
        held = zip(self.keys, self.manifest.segments, strict=True)
        return sum(segment.page_bytes for key, segment in held if key is not None)

    def check(self) -> None:
        assert not (is_image(self.manifest) and self.missing()), (
            f"{self.name}: an image is in memory as a whole or gone"
        )
        for i, segment in enumerate(self.manifest.segments):
            pages = self.pages(i)
            codes, placed = set(self.residency[pages].tolist()), set(self.placed[pages].tolist())
            where = f"{self.name}: segment {i}"
            assert codes in ({LOADING}, placed), f"{where}: residency {codes}, counted in {placed}"
            assert (placed == {self.disk}) == (self.keys[i] is None), f"{where}: {placed} with key {self.keys[i]}"
            assert self.disk not in placed or len(placed) == 1, f"{where}: in memory and on disk at once"
            if self.resident(i):
                assert self.ready[self.tensors_of[i]].all(), f"{where}: resident with a tensor that is not ready"
            end = 0
            for number in self.tensors_of[i]:
                extent = self.manifest.tensors[number].extent
                if extent.length == 0:  # an empty tensor lies nowhere
                    continue
                assert extent.offset >= end, f"{where}: tensors overlap at {extent.offset}"
                end = extent.offset + extent.length
            assert end <= segment.page_bytes, f"{where}: tensors end at {end}"


class Catalog:
    """All models of a pool, by name, by identity and by the files they came from. Guarded by the pool's lock."""

    def __init__(self) -> None:
        self._by_id: dict[str, ModelRecord] = {}
        self._by_name: dict[str, ModelRecord] = {}
        self._by_file: dict[FileIdentity, dict[ModelRecord, int]] = {}
        self._next_id = 0

    def __iter__(self) -> Iterator[ModelRecord]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, record: ModelRecord) -> None:
        if record.name in self._by_name:
            raise Refused(
                f"the name {record.name!r} is taken by {self._by_name[record.name].manifest.path}; "
                "unload that model or load this one under another --name"
            )
        record.first_id = self._next_id
        self._next_id += record.first_page[-1]
        self._by_id[record.id] = record
        self._by_name[record.name] = record
        for i, file in enumerate(file_identities(record.manifest)):
            self._by_file.setdefault(file, {})[record] = i

    def remove(self, record: ModelRecord) -> None:
        del self._by_id[record.id]
        del self._by_name[record.name]
        for file in file_identities(record.manifest):
            holders = self._by_file[file]
            del holders[record]
            if not holders:
                del self._by_file[file]

    def knows(self, name: str) -> bool:
        return name in self._by_name

    def named(self, name: str) -> ModelRecord:
        """Raises ModelNotFound with the names that there are."""
        record = self._by_name.get(name)
        if record is None:
            known = ", ".join(sorted(self._by_name)[:5]) or "none"
            raise ModelNotFound(f"no model {name!r} in the pool (it holds: {known}); load it first: tiermem load PATH")
        return record

    def by_id(self, model_id: str) -> ModelRecord | None:
        return self._by_id.get(model_id)

    def find(self, manifest: Manifest) -> tuple[ModelRecord, tuple[int, ...] | None] | None:
        """The model with this manifest's weights, and which of its files they are (None: all of them).

        A file alone is found inside the model of its directory, so that a shard opened by path is not held twice.
        """
        whole = self._by_id.get(manifest.identity)
        if whole is not None:
            return whole, None
        holders = [self._by_file.get(file, {}) for file in file_identities(manifest)]
        for record in holders[0] if holders else ():
            if all(record in others for others in holders):
                return record, tuple(others[record] for others in holders)
        return None

    def free_name(self, wanted: str, identity: str) -> str:
        """`wanted`, or where another model has it `wanted@` and the first digits of the identity."""
        return wanted if wanted not in self._by_name else f"{wanted}@{identity[:8]}"

    def check(self) -> None:
        assert set(self._by_name.values()) == set(self._by_id.values()), "names and identities differ"
        for record in self:
            assert self._by_name[record.name] is record
            record.check()
        keys = [key for record in self for key in record.keys if key is not None]
        assert len(keys) == len(set(keys)), "two segments share a file"


def file_identities(manifest: Manifest) -> Sequence[FileIdentity]:
    """None of a model that came from a peer: what its files are called there may be other files here."""
    if is_remote(manifest.path):
        return []
    return [(f.device, f.inode, f.size, f.mtime_ns, f.header_digest) for f in manifest.files]
