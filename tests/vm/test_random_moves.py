"""Pages of a model move at random while two clients read it: bytes, mappings and OS pages stay as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.integration.weights import Weights
from tests.vm.conftest import Scale
from tests.vm.reader import Reader
from tests.vm.tiered import RANDOM_MOVES, Tiered

pytestmark = [pytest.mark.numa, pytest.mark.cxl]

MOVES_S = 400.0


def test_clients_see_nothing_of_moves_but_where_the_pages_lie(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale
) -> None:
    before = [reader.tell() for reader in readers]
    assert [told.huge_bytes for told in before] == [len(scale.pages) << 21] * 2
    moved = pool.moved_pages
    pool.set_policy(RANDOM_MOVES)
    for reader in readers:
        reader.verify(*range(scale.layers))
    pool.wait(lambda: pool.moved_pages >= moved + scale.moves, f"{scale.moves} pages moved", MOVES_S)
    pool.hold()
    nodes = pool.nodes(weights.name)
    for reader, earlier in zip(readers, before, strict=True):
        reader.read_all(2 * scale.layers)
        reader.verify()
        after = reader.tell()
        assert after.wrong == 0
        assert after == replace(earlier, reads=after.reads, nodes=nodes)
    assert set(pool.migration()["moved_pages"]) == {"dram->cxl", "cxl->dram"}
