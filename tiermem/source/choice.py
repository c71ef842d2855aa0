"""Choice: what the bytes of a load come from, and the reads that bring them. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.fingerprint import is_image
from tiermem.load import Task, plan_checks, plan_reads
from tiermem.loader import BLOCK_BYTES
from tiermem.peer.address import is_remote
from tiermem.peers import Peers
from tiermem.policy import DISK, PEER
from tiermem.source import peer
from tiermem.source.file import FileSource
from tiermem.source.fill import Source
from tiermem.source.in_turn import SourcesInTurn


def reads_of(
    record: ModelRecord, segments: Mapping[int, _native.Segment], peers: Peers, order: Sequence[str]
) -> tuple[list[Task], Source | None]:
    """The tasks that fill these segments of a model, and their source; none for an image, which its creator fills.

    A checkpoint of this host comes in that `order` from disk and from peers that have the same content, which is known
    once it was loaded before.
    """
    if is_image(record.manifest):
        return plan_checks(record, segments), None
    if is_remote(record.manifest.path):
        return plan_reads(record.manifest, segments, peer.BLOCK_BYTES), peer.PeerSource(peers, record, segments)
    tasks, file = plan_reads(record.manifest, segments, BLOCK_BYTES), FileSource(record.manifest.files)
    if PEER not in order or not peers.configured or record.content() is None:
        return tasks, file
    sources: dict[str, Source] = {DISK: file, PEER: peer.PeerSource(peers, record, segments)}
    return tasks, SourcesInTurn(record.name, [(name, sources[name]) for name in order])
