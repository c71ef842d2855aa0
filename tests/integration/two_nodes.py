"""Two nodes: a host with memory-only node 1 beside node 0, as far as a pool can tell. Moves no real page."""

from __future__ import annotations

import errno
import random
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.unit.tiers_bench import Kernel
from tiermem import _native, host
from tiermem.host import NumaNode
from tiermem.types import PAGE_BYTES

TIERS = ("dram", "cxl")
"""The tier of each node."""


class FakeProbe:
    """Memory that takes no time to measure."""

    def __init__(self, nbytes: int, nodes: int) -> None:
        self.nodes = nodes

    def latency(self, loads: int) -> float:
        return 1e-3 * self.nodes

    def bandwidth(self, threads: int) -> float:
        return 1e10 / self.nodes

    def close(self) -> None:
        pass


class TwoNodes(Kernel):
    """The kernel of that host: new pages are on the node that they were prefaulted for; `refuses` of 100 moves fail.

    `busy_s`: how long a call of `move` takes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.refuses = 0
        self.busy_s = 0.0
        self._chance = random.Random(3)
        nodes = (NumaNode(0, "0-3", 1 << 40, 1 << 40), NumaNode(1, "", 1 << 40, 1 << 40))
        prefault = _native.Segment.prefault

        def on_node(segment: Any, offset: int, length: int, threads: int, mask: int) -> None:
            for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES):
                self.nodes.setdefault((segment.name, page), mask.bit_length() - 1 if mask else 0)
            prefault(segment, offset, length, threads, 0)

        monkeypatch.setattr(host, "numa_nodes", lambda: nodes)
        monkeypatch.setattr(host, "nodes_with_memory", lambda: "0-1")
        monkeypatch.setattr(_native, "Numa", lambda: self)
        monkeypatch.setattr(_native, "Probe", FakeProbe)
        monkeypatch.setattr(_native.Segment, "prefault", on_node)

    def move(self, segment: Any, pages: npt.NDArray[np.uint32], node: int, *, shared: bool) -> npt.NDArray[np.int32]:
        if self.busy_s:
            threading.Event().wait(self.busy_s)
        if self._chance.randrange(100) < self.refuses:
            answers = [0, 0, _native.WAS_THERE, -errno.EBUSY, -errno.EACCES, -errno.ENOENT]
            self.script = [[self._chance.choice(answers) for _ in pages]]
        return super().move(segment, pages, node, shared=shared)

    def tiers_of(self, key: str, pages: int) -> list[str]:
        """Where the pages of a segment file really are."""
        return [TIERS[self.nodes[key, page]] for page in range(pages)]
