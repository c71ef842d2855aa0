"""Segments on reserved 2 MiB pages: shared as ever, and copied where a reader wants to write."""

from __future__ import annotations

import logging
import time

import numpy as np
import pytest

from tests.conftest import CheckpointWriter
from tests.integration.conftest import PoolMaker


@pytest.mark.root
@pytest.mark.usefixtures("reserved")
def test_readers_who_write_get_a_copy_of_reserved_pages(
    checkpoint: CheckpointWriter, embedded: PoolMaker, caplog: pytest.LogCaptureFixture
) -> None:
    written = checkpoint(layers=2)
    pool = embedded(backing="hugetlb", tier="dram=16MiB")
    assert pool.status()["pool"]["backing"] == "hugetlb"
    name, expected = next(iter(written.tensors.items()))
    with pool.open(written.path) as shared, caplog.at_level(logging.WARNING):
        writable = pool.open(written.path, writable=True)
        assert "is copied" in caplog.text
        assert written.same(shared)
        assert written.same(writable)
        mine = writable[name]
        mine[...] = 0
        np.testing.assert_array_equal(shared[name], expected)
    del mine, writable
    deadline = time.monotonic() + 5
    while pool.status()["pool"]["leases"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.status()["pool"]["leases"] == 0
