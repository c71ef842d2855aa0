"""What clients read gets into DRAM under every policy that ranks by heat, and makes room when other pages are read."""

from __future__ import annotations

import pytest

from tests.integration.weights import Weights
from tests.vm.conftest import Scale
from tests.vm.reader import Reader
from tests.vm.tiered import Tiered

pytestmark = pytest.mark.numa

SWAP_S = 60.0
"""Policies ask for evidence of several of their periods; the sampler needs seconds under emulation."""


@pytest.mark.parametrize("policy", ["lru", "hemem", "memtis", "tpp", "layer_prefetch"])
def test_pages_that_are_read_get_into_dram(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale, policy: str
) -> None:
    half = scale.layers // 2
    for hot in (range(half, scale.layers), range(half)):
        for reader in readers:
            reader.touch(*hot)
        pool.set_policy(policy)
        pool.wait_for(weights.name, dict.fromkeys(scale.pages_of(hot), "dram"), SWAP_S)
    assert pool.migration()["policy_failure"] == ""


def test_balancing_latencies_moves_pages_and_keeps_going(
    pool: Tiered, readers: tuple[Reader, Reader], scale: Scale
) -> None:
    """Where the pages end says nothing here: latencies are those of an emulator."""
    moved = pool.moved_pages
    for reader in readers:
        reader.touch(*range(scale.layers // 2))
    pool.set_policy("colloid")
    pool.wait(lambda: pool.moved_pages > moved, "pages move", SWAP_S)
    assert pool.migration()["policy_failure"] == ""
