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
from tiermem.memory import Memory

_log = logging.getLogger(__name__)


def adopt(files: CatalogFiles, memory: Memory) -> Iterator[tuple[ModelRecord, dict[int, _native.Segment]]]:
    """Every model on file with the segments of it that are still there, begun and counted in `memory`."""
    present = set(memory.backing.keys())
    for record, keys in files:
        segments = {}
        for i, key in enumerate(keys):
            if key is None or key not in present:
                continue
            try:
                segments[i] = memory.adopt(record, i, key)
            except (NativeError, CapacityError) as error:
                _log.warning("%s: segment %s not adopted: %s", record.name, key, error)
                continue
            present.discard(key)
        _log.info("adopted %s: %d of %d segments", record.name, len(segments), len(keys))
        yield record, segments
    for key in present:
        memory.backing.unlink(key)
