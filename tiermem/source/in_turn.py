"""Sources in turn: the first of them that can brings the bytes, the next one what it could not. Reads nothing itself.

Only for tensors whose digests are on record: a part that one source began is written again by the next.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from tiermem import _native
from tiermem.errors import CheckpointChanged, DigestMismatch, ReadError, TiermemError
from tiermem.source.fill import Fill, Source

_log = logging.getLogger(__name__)


class SourcesInTurn:
    """Of one load of the model of that name, by the names of the sources, the preferred one first."""

    def __init__(self, model: str, sources: Sequence[tuple[str, Source]]) -> None:
        self._model = model
        self._all = list(sources)
        self._left = list(sources)
        self._brought: dict[int, set[str]] = {}  # by which sources, each tensor so far
        self._lock = threading.Lock()

    @property
    def reads_at_once(self) -> int | None:
        return self._left[0][1].reads_at_once

    @property
    def whole_segments(self) -> bool:
        return any(source.whole_segments for _, source in self._all)

    def read(self, file: int, fills: Sequence[Fill], staging: _native.Staging) -> None:
        """Raises what the last of the sources raises."""
        while True:
            name, source = self._left[0]
            try:
                source.read(file, fills, staging)
                with self._lock:
                    for fill in fills:
                        self._brought.setdefault(fill.tensor, set()).add(name)
                return
            except (ReadError, CheckpointChanged, DigestMismatch) as error:
                if not self._give_up(name, error):
                    raise

    def disbelieve(self, tensor: int) -> bool:
        with self._lock:
            name, source = self._left[0]
            brought = self._brought.pop(tensor, set())
        return brought != {name} or source.disbelieve(tensor) or self._give_up(name, None)

    def check(self) -> None:
        """Of the source that is read from now: what others brought has its digest."""
        self._left[0][1].check()

    def close(self) -> None:
        for _, source in self._all:
            source.close()

    def _give_up(self, name: str, error: TiermemError | None) -> bool:
        """Go on with the source after this one; False where there is none."""
        with self._lock:
            if self._left[0][0] != name:
                return True
            if len(self._left) == 1:
                return False
            self._left.pop(0)
            then = self._left[0][0]
        _log.info("%s comes from %s, not from %s: %s", self._model, then, name, error or "its bytes are others")
        return True
