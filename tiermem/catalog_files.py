"""Catalog files: what a new daemon needs to adopt a pool's models, one small durable file a model.

Owns one directory. Never touches segments, and never believes a file that does not match its own digest.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from tiermem import durable
from tiermem.catalog import ModelRecord
from tiermem.digests import DIGEST_BYTES
from tiermem.errors import ProtocolError, ReadError
from tiermem.rpc.codec import decode_manifest, encode_manifest

_FORMAT = 1
_log = logging.getLogger(__name__)


class CatalogFiles:
    """`directory` holds one file per model identity. `error` says why the last change could not be kept, if so.
    `disk`: the tier of what is not in memory."""

    def __init__(self, directory: Path, disk: int = 1) -> None:
        self.directory = directory
        self._disk = disk
        self.error = ""
        self._writing = threading.Lock()
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def sync(self, model_id: str, current: Callable[[], ModelRecord | None]) -> None:
        """Keep what is resident of the `current` model of that identity, or forget it where there is none.

        A directory that is full costs the next daemon this model, not this one its service.
        """
        with self._writing:
            self.error = ""
            try:
                record = current()
                if record is not None:
                    self._put(record)
                # Asked again: it may have been removed while it was written.
                if current() is None:
                    self.remove(model_id)
            except (OSError, ValueError) as error:  # ValueError: a path that is no text
                self._complain(error, f"a restart would not find {record.name if record else model_id}")

    def _put(self, record: ModelRecord) -> None:
        held = [key if key is not None and record.resident(i) else None for i, key in enumerate(record.keys)]
        body = {
            "format": _FORMAT,
            "name": record.name,
            "manifest": encode_manifest(record.manifest),
            "digests": b"".join(digest or bytes(DIGEST_BYTES) for digest in record.digests),
            "keys": held,
            "generation": record.generation,
            "pins": record.pins,
            "opens": record.opens,
            "last_open_s": record.last_open_s,
        }
        durable.write(self.directory / record.id, msgpack.packb(body))

    def remove(self, model_id: str) -> None:
        """Forget a model, as far as the directory can be written."""
        try:
            (self.directory / model_id).unlink(missing_ok=True)
        except OSError as error:
            self._complain(error, f"a restart would find {model_id} again, without its bytes")

    def _complain(self, error: OSError | ValueError, consequence: str) -> None:
        self.error = f"{self.directory}: {getattr(error, 'strerror', None) or error}; {consequence}"
        _log.error("catalog not kept: %s", self.error)

    def __iter__(self) -> Iterator[tuple[ModelRecord, list[str | None]]]:
        """Every model on file with the segment keys that it had; files that are damaged are removed with a warning."""
        for path in sorted(self.directory.iterdir()):
            if path.is_dir():
                continue
            if path.name.startswith("."):
                path.unlink()
                continue
            try:
                record, keys = _decode(durable.read(path), self._disk)
                if record.id != path.name:
                    raise ReadError(f"{path} is not the file of {record.name}, which is {record.id}")
                yield record, keys
            except (ReadError, ProtocolError, ValueError, KeyError, TypeError, OSError) as error:
                _log.warning("catalog file dropped, its model must be loaded again: %s", error)
                path.unlink(missing_ok=True)


def _decode(body: bytes, disk: int) -> tuple[ModelRecord, list[str | None]]:
    saved: dict[str, Any] = msgpack.unpackb(body)
    if saved["format"] != _FORMAT:
        raise ReadError(f"catalog format {saved['format']}, this version reads {_FORMAT}")
    manifest = decode_manifest(saved["manifest"])
    joined = saved["digests"]
    digests: list[bytes | None] = [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]
    keys: list[str | None] = saved["keys"]
    if len(digests) != len(manifest.tensors) or len(keys) != len(manifest.segments):
        raise ReadError(f"catalog file of {saved['name']} does not fit its own manifest")
    record = ModelRecord(saved["name"], manifest, digests, disk)
    record.loaded = True
    record.generation = saved["generation"]
    record.pins = saved["pins"]
    record.opens = saved["opens"]
    record.last_open_s = saved["last_open_s"]
    return record, keys
