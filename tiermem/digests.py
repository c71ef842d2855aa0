"""Digest records: the BLAKE3 digest of every tensor, kept by the identity of the checkpoint it was computed from.

Owns one directory of small files. A record outlives the pool, so a second load is checked against the first one.
Never computes a digest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tiermem import durable
from tiermem.errors import ReadError
from tiermem.types import Manifest

DIGEST_BYTES = 32
_FORMAT = b"\1"
"""First byte of a record; one of another format is as good as none."""

_log = logging.getLogger(__name__)


class DigestRecords:
    """Records in `directory`, one file per checkpoint identity; on file by tensor name, since renaming the files of a
    checkpoint changes the order of its tensors and not its identity."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, manifest: Manifest) -> list[bytes | None] | None:
        """Digests in manifest order, or None where none (or no whole record) is kept."""
        try:
            body = durable.read(self.directory / manifest.identity)
        except FileNotFoundError:
            return None
        except (ReadError, OSError) as error:
            _log.warning("digest record not used: %s", error)
            return None
        joined = body.removeprefix(_FORMAT)
        if len(body) != 1 + len(joined) or len(joined) != len(manifest.tensors) * DIGEST_BYTES:
            return None
        digests: list[bytes | None] = [None] * len(manifest.tensors)
        for place, number in enumerate(_by_name(manifest)):
            digests[number] = joined[place * DIGEST_BYTES : (place + 1) * DIGEST_BYTES]
        return digests

    def put(self, manifest: Manifest, digests: Sequence[bytes]) -> None:
        """Keep digests in manifest order. A directory that cannot be written costs a warning, not the load."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            joined = b"".join(digests[i] for i in _by_name(manifest))
            durable.write(self.directory / manifest.identity, _FORMAT + joined)
        except OSError as error:
            _log.warning("digest record of %s not kept in %s: %s", manifest.path, self.directory, error)


def _by_name(manifest: Manifest) -> list[int]:
    return [manifest.by_name[name] for name in sorted(manifest.by_name)]
