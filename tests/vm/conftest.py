"""What the tests in guests share: which guest a test is for, a daemon with two tiers, two clients that read a model.

`make test-vm` boots the guests. Outside of one these tests are skipped; inside, nothing may be.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.weights import Weights, write_weights
from tests.vm.reader import Reader
from tests.vm.tiered import Tiered

KINDS = {
    "numa": "a second, CPU-less NUMA node",
    "cxl": "a memory-only node of CXL memory",
}
DEVICES = {"rxe": "an RDMA device"}
GUEST = frozenset(filter(None, os.environ.get("VM_GUEST", "").split(",")))
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    for kind, what in (KINDS | DEVICES).items():
        config.addinivalue_line("markers", f"{kind}: needs {what}: runs in `tests/vm/guest --{kind}`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.parent == HERE]
    for item in ours:
        if not kinds_of(item) and not devices_of(item):
            item.add_marker("numa")  # the guest that is quickest
        if not GUEST:
            kinds = " or ".join(KINDS[kind] for kind in kinds_of(item))
            wanted = " and ".join(filter(None, [kinds, *(DEVICES[device] for device in devices_of(item))]))
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} that it may fill and take away: make test-vm"))
    others = [item for item in ours if GUEST and not runs_here(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def kinds_of(item: pytest.Item) -> list[str]:
    """The guests that a test is for, any of them."""
    return [kind for kind in KINDS if item.get_closest_marker(kind)]


def devices_of(item: pytest.Item) -> list[str]:
    """What the guest of a test must have besides, all of it."""
    return [device for device in DEVICES if item.get_closest_marker(device)]


def runs_here(item: pytest.Item) -> bool:
    kinds = kinds_of(item)
    return GUEST.issuperset(devices_of(item)) and not (kinds and GUEST.isdisjoint(kinds))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    if GUEST and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped in a guest, which has all that it needs: {report.longrepr}"
    return report


@dataclass(frozen=True, slots=True)
class Scale:
    """How much a guest can do: emulated CXL memory moves a few MB/s. `moves`: pages."""

    dram: str
    layers: int
    layer_pages: int
    moves: int

    @property
    def pages(self) -> range:
        """Of the model that all tests share."""
        return range(self.layers * self.layer_pages)

    def pages_of(self, layers: range) -> range:
        return range(layers.start * self.layer_pages, layers.stop * self.layer_pages)


SCALES = {"numa": Scale("104MiB", 16, 4, 1000), "cxl": Scale("8MiB", 2, 2, 60)}


@pytest.fixture(scope="session")
def scale() -> Scale:
    return next(SCALES[kind] for kind in KINDS if kind in GUEST)


@pytest.fixture(scope="session")
def weights(scale: Scale, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """The model that all tests share."""
    path = tmp_path_factory.mktemp("weights") / "model"
    return write_weights(path, layers=scale.layers, layer_bytes=scale.layer_pages << 21)


@pytest.fixture(scope="session")
def _pool(scale: Scale) -> Iterator[Tiered]:
    with Tiered(dram=scale.dram) as pool:
        yield pool


@pytest.fixture
def pool(_pool: Tiered) -> Iterator[Tiered]:
    """The daemon that all tests share. Its policy holds, before and after each, and its quota was kept."""
    _pool.hold()
    yield _pool
    _pool.hold()
    _pool.check_quota()


@pytest.fixture(scope="session")
def _readers(_pool: Tiered, weights: Weights) -> Iterator[tuple[Reader, Reader]]:
    with ExitStack() as stack:
        first, second = (stack.enter_context(Reader(_pool.address, weights)) for _ in range(2))
        yield first.ready(), second.ready()


@pytest.fixture
def readers(_readers: tuple[Reader, Reader]) -> Iterator[tuple[Reader, Reader]]:
    """Two clients that have the model open, the same ones in all tests. Every byte that they read was right."""
    yield _readers
    for reader in _readers:
        reader.verify()
        assert reader.tell().wrong == 0
