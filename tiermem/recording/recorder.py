"""Recorder: writes a recording, frame by frame. Knows no frame's meaning, and never reads one.

Frames are appended in place, each whole by one write, so that a recorder which is killed leaves a file that reads up to
its last whole frame.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from tiermem.errors import Closed
from tiermem.recording.frames import MAGIC


class Recorder:
    """A recording that is being written. Any thread may append."""

    def __init__(self, path: str | Path) -> None:
        """Create the file, or empty it; only its owner may read it, for it tells addresses. Raises OSError."""
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._end = 0
        try:
            self.append(MAGIC)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self._end

    def append(self, frames: bytes) -> None:
        """Write whole frames. Raises OSError (no space), and then the file is as it was; or Closed."""
        with self._lock:
            if self._fd < 0:
                raise Closed("the recording is closed; nothing can be appended")
            left = memoryview(frames)
            try:
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError:
                with suppress(OSError):  # a device has no length
                    os.ftruncate(self._fd, self._end)
                    os.lseek(self._fd, self._end, os.SEEK_SET)
                raise
            self._end += len(frames)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
