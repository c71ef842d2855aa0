"""Shared read-only weights under the kernel's own tiering and under ours: the kernel's numbers are for people to judge.

Prints a table; docs/tiering-kernel.md tells what it means.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.integration.weights import Weights
from tests.vm.conftest import Scale
from tests.vm.reader import Reader, Told
from tests.vm.tiered import ALL_SLOW, Tiered

pytestmark = pytest.mark.numa

ANONYMOUS_MIB = 8
KERNEL_S = 40.0
SETTINGS = {
    "/proc/sys/kernel/numa_balancing": "2",
    "/sys/kernel/mm/numa/demotion_enabled": "1",
    "/sys/kernel/debug/sched/numa_balancing/scan_delay_ms": "100",
    "/sys/kernel/debug/sched/numa_balancing/scan_period_min_ms": "100",
    "/sys/kernel/debug/sched/numa_balancing/scan_period_max_ms": "100",
    "/sys/kernel/debug/sched/numa_balancing/hot_threshold_ms": "100000",
}
"""Its tiering, and a scan and a threshold that suit a test: by default a pass takes minutes."""


@contextmanager
def kernel_tiering() -> Iterator[None]:
    before = {path: Path(path).read_text() for path in SETTINGS}
    try:
        for path, value in SETTINGS.items():
            Path(path).write_text(value)
        yield
    finally:
        for path, value in before.items():
            Path(path).write_text(value)


def test_the_kernel_promotes_anonymous_memory_and_tiermem_shared_weights(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = range(scale.layers // 4)
    pages = scale.pages_of(hot)
    pool.set_policy(ALL_SLOW)
    pool.wait_for(weights.name, dict.fromkeys(scale.pages, "cxl"), 60)
    pool.hold()
    with ExitStack() as stack:
        with kernel_tiering():  # threads keep the scan period that they began with, hence a process of its own
            reader = stack.enter_context(Reader(pool.address, weights)).ready()
            reader.anonymous(ANONYMOUS_MIB, node=1)
            placed = reader.tell()
            assert placed.nodes == [[1]] * len(scale.pages)
            reader.touch(*hot)
            time.sleep(KERNEL_S)
            kernel = reader.tell()
        promoted = kernel.anonymous.count(0)
        assert promoted > len(placed.anonymous) / 2

        pool.set_policy("lru")
        pool.wait_for(weights.name, dict.fromkeys(pages, "dram"), 60)
        pool.hold()
        ours = reader.tell()
    assert [ours.nodes[page] for page in pages] == [[0]] * len(pages)
    with capsys.disabled():
        show(len(pages), placed, kernel, ours)


def show(pages: int, *told: Told) -> None:
    print(f"\nOS pages by node           {'placed':>16}  {'kernel tiering':>16}  {'tiermem, lru':>16}")
    own = [Counter(each.anonymous) for each in told]
    shared = [Counter(node for page in each.nodes[:pages] for node in page * 512) for each in told]
    for name, counts in (("anonymous, read", own), ("weights, shared, read", shared)):
        cells = [", ".join(f"node {node}: {count}" for node, count in sorted(each.items())) for each in counts]
        print(f"{name:26} " + "  ".join(f"{cell:>16}" for cell in cells))
