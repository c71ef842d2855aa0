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

DIGEST_BYTES = 32

_log = logging.getLogger(__name__)


class DigestRecords:
    """Records in `directory`, one file per checkpoint identity; tensor digests in manifest order."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, identity: str, tensors: int) -> tuple[bytes, ...] | None:
        """Digests of the `tensors` tensors of that checkpoint, or None where none (or no whole record) is kept."""
        try:
            body = durable.read(self.directory / identity)
        except FileNotFoundError:
            return None
        except (ReadError, OSError) as error:
            _log.warning("digest record not used: %s", error)
            return None
        if len(body) != tensors * DIGEST_BYTES:
            return None
        return tuple(body[i : i + DIGEST_BYTES] for i in range(0, len(body), DIGEST_BYTES))

    def put(self, identity: str, digests: Sequence[bytes]) -> None:
        """Keep a record. A directory that cannot be written costs a warning, not the load."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            durable.write(self.directory / identity, b"".join(digests))
        except OSError as error:
            _log.warning("digest record of %s not kept in %s: %s", identity[:12], self.directory, error)
