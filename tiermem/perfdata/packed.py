"""Packed: the zstd stream that PERF_RECORD_COMPRESSED records carry in pieces. Bounds what it unpacks to."""

from __future__ import annotations

from tiermem.errors import RecordingError

_STEP = 512
"""Bytes given to zstd at once: an empty block of 4 bytes may stand for 128 KiB, so that a step makes 16 MiB at most."""
_RATIO = 256
_ROOM = 16 << 20
"""A stream may unpack to _RATIO times its length and _ROOM; what perf packs shrinks to a tenth or so."""
_WINDOW = 1 << 27
"""Bytes that zstd may look back, the most that perf's own reader allows."""


class Packed:
    """One zstd stream over many records. Raises RecordingError where it is none, or unpacks to too much."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError:
            raise RecordingError(
                "the file is compressed by zstd; to read it, pip install 'tiermem[report]', or record without -z"
            ) from None
        self._error = zstandard.ZstdError
        self._stream = zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(read_across_frames=True)
        self._taken = self._given = 0

    def unpack(self, data: memoryview) -> bytes:
        """What the next `data` of the stream unpacks to."""
        parts = []
        for start in range(0, len(data), _STEP):
            step = data[start : start + _STEP]
            try:
                part = self._stream.decompress(step)
            except self._error as error:
                raise RecordingError(f"a compressed record does not unpack ({error}); record again") from error
            self._taken += len(step)
            self._given += len(part)
            if self._given > _ROOM + _RATIO * self._taken:
                raise RecordingError(
                    f"{self._taken} compressed bytes unpack to more than {self._given}, {_RATIO} times as many: no "
                    f"recording does, so it is refused"
                )
            parts.append(part)
        return b"".join(parts)
