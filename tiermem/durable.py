"""Small files that must survive a crash whole: written beside, synced, renamed. Never holds weights.

A file is a 32-byte BLAKE3 digest of its body, then the body: a torn or foreign file is told from a good one.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from blake3 import blake3

from tiermem.errors import ReadError

_DIGEST_BYTES = 32


def write(path: Path, body: bytes) -> None:
    """Replace `path` by `body`, or leave it as it was. Raises OSError (no space, no permission)."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(beside, "wb") as out:
            out.write(blake3(body).digest() + body)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def read(path: Path) -> bytes:
    """The body of `path`. Raises FileNotFoundError, or ReadError where the file is not what `write` left."""
    content = path.read_bytes()
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if blake3(body).digest() != digest:
        raise ReadError(f"{path}: {len(content)} bytes that do not match their own digest; the file is ignored")
    return body
