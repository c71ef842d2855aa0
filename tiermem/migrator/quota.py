"""Quota: how many bytes a second may move. Never sleeps, and never asks for the time."""

from __future__ import annotations


class Quota:
    """In any time t at most `bytes_s` * t bytes and what was spent last are moved: who spends waits afterwards."""

    def __init__(self, bytes_s: int) -> None:
        self.bytes_s = bytes_s
        self._free_s = float("-inf")

    def delay(self, now_s: float) -> float:
        """Seconds until more may be spent."""
        return max(0.0, self._free_s - now_s)

    def spend(self, nbytes: int, now_s: float) -> None:
        self._free_s = max(self._free_s, now_s) + nbytes / self.bytes_s
