"""Adoption: a new daemon takes over the segments that an earlier one left. Never reads a checkpoint.

Segments that no catalog file names (a load that was under way) are removed. The rest are digested again before they
are served: the memory was nobody's for a while.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from tiermem import _native
from tiermem.catalog import ModelRecord
from tiermem.catalog_files import CatalogFiles
from tiermem.errors import CapacityError, NativeError
from tiermem.segment import Backing
from tiermem.tier import Tier

_log = logging.getLogger(__name__)


def adopt(
    files: CatalogFiles, backing: Backing, dram: Tier
) -> Iterator[tuple[ModelRecord, dict[int, _native.Segment]]]:
    """Every model on file with the segments of it that are still there, begun and counted in `dram`."""
    present = set(backing.keys())
    for record, keys in files:
        segments = {}
        for i, key in enumerate(keys):
            if key is None or key not in present:
                continue
            try:
                segments[i] = _segment(record, i, key, backing, dram)
            except (NativeError, CapacityError) as error:
                _log.warning("%s: segment %s not adopted: %s", record.name, key, error)
                continue
            present.discard(key)
        _log.info("adopted %s: %d of %d segments", record.name, len(segments), len(keys))
        yield record, segments
    for key in present:
        backing.unlink(key)


def _segment(record: ModelRecord, number: int, key: str, backing: Backing, dram: Tier) -> _native.Segment:
    nbytes = record.manifest.segments[number].page_bytes
    dram.reserve(nbytes)
    try:
        segment = backing.adopt(key, nbytes)
    except NativeError:
        dram.release(nbytes)
        raise
    record.begin(number, key)
    return segment
