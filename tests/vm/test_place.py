"""New pages are put where the policy's `place` says, from the first touch on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.weights import write_weights
from tests.vm.reader import Reader
from tests.vm.tiered import ALTERNATING, Tiered

pytestmark = [pytest.mark.numa, pytest.mark.cxl]


def test_a_load_prefaults_pages_on_the_tiers_that_place_says(pool: Tiered, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "placed", layers=2, layer_bytes=3 << 20)
    pool.set_policy(ALTERNATING)
    moved = pool.moved_pages
    with Reader(pool.address, weights) as reader:
        told = reader.ready().tell()
        reader.verify(0, 1)
        assert reader.read_all(2).wrong == 0
        assert pool.tiers(weights.name) == ["dram", "cxl", "dram", "cxl"]
        assert told.nodes == [[0], [1], [0], [1]]
    assert pool.moved_pages == moved


def test_static_interleave_spreads_a_load_over_both_tiers_and_moves_nothing(pool: Tiered, tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "spread", layers=2, layer_bytes=8 << 20)
    pool.set_policy("static_interleave")
    moved = pool.moved_pages
    pool.control.load(weights.path)
    assert set(pool.tiers(weights.name)) == {"dram", "cxl"}
    pool.hold()
    assert pool.moved_pages == moved
    pool.control.remove(weights.name)
