"""Frames of a recording, as a watcher gets them, for tests to look at."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from tests.integration.child import DEADLINE_S, eventually
from tiermem.recording.frames import read_frames
from tiermem.rpc import messages as m
from tiermem.rpc.channel import Stream

Frame = dict[str, Any]


def frames_of(data: bytes) -> list[Frame]:
    """All frames of `data`, which holds nothing else."""
    notes: list[str] = []
    found = [fields for _, fields in read_frames(io.BytesIO(data), len(data), notes)]
    assert notes == []
    return found


class Watching:
    """Follows a pool's journal on a thread, from construction to the end of its `with` block."""

    def __init__(self, stream: Stream) -> None:
        self.frames: list[Frame] = []
        self.nbytes = self.dropped = 0
        self.ended = False
        self._stream = stream
        stream.follow(self._take, self._end)

    def _take(self, event: m.WatchEvent) -> None:
        self.frames += frames_of(event.frames)
        self.nbytes += len(event.frames)
        self.dropped += event.dropped

    def _end(self) -> None:
        self.ended = True

    def of(self, kind: str, **fields: Any) -> list[Frame]:
        """Frames of a kind that came so far and have these fields."""
        found = [frame for frame in list(self.frames) if frame["kind"] == kind]
        return [frame for frame in found if frame | fields == frame]

    def until(
        self, kind: str, count: int = 1, such: Callable[[Frame], bool] = lambda frame: True, **fields: Any
    ) -> None:
        """Return when `count` such frames have come."""
        eventually(
            lambda: sum(map(such, self.of(kind, **fields))) >= count, f"{count} {kind} {fields} told", DEADLINE_S
        )

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.cancel()
        eventually(lambda: self.ended, "the stream ended")
