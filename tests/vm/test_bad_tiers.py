"""Tiers that fill up, go away, or may not be used; models that go and daemons that die while pages move."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.child import Child
from tests.integration.daemon import Daemon
from tests.integration.weights import Weights, write_weights
from tests.vm.conftest import Scale
from tests.vm.reader import DEADLINE_S, Reader
from tests.vm.tiered import ALL_SLOW, RANDOM_MOVES, Tiered
from tiermem.errors import ModelNotFound

SETTLE_S = 60.0


@contextmanager
def full(node: int) -> Iterator[None]:
    """The node has no room for a page of 2 MiB."""
    with Child(["-m", "tests.vm.ballast", str(node), "0"]) as ballast:
        assert ballast.line(DEADLINE_S) == "full"
        yield


@contextmanager
def offline(node: int) -> Iterator[None]:
    """The memory of a node in the movable zone is taken out; the kernel moves what lies there elsewhere."""
    blocks = [Path(f"/sys/devices/system/memory/{path.name}/state")
              for path in Path(f"/sys/devices/system/node/node{node}").glob("memory[0-9]*")]  # fmt: skip
    assert blocks
    try:
        for block in blocks:
            block.write_text("offline")
        yield
    finally:
        for block in blocks:
            if block.read_text().strip() == "offline":
                block.write_text("online_movable")


@pytest.mark.numa
def test_moves_to_a_full_node_are_refused_until_there_is_room(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale
) -> None:
    readers[0].touch(0)
    pool.set_policy("lru")
    pool.wait_for(weights.name, dict.fromkeys(range(scale.layer_pages), "dram"), SETTLE_S)
    pool.hold()
    refused = pool.refused.get("no space", 0)
    with full(1):
        pool.set_policy(ALL_SLOW)
        pool.wait(lambda: pool.refused.get("no space", 0) > refused, "moves are refused", SETTLE_S)
        pool.hold()
        # Of a page that did not fit as a whole the kernel may have moved a part; it counts in the slower tier.
        for kernel, daemon in zip(readers[0].tell().nodes, pool.nodes(weights.name), strict=True):
            assert daemon == kernel[-1:]
    pool.set_policy(ALL_SLOW)
    pool.wait_for(weights.name, dict.fromkeys(scale.pages, "cxl"), SETTLE_S)


@pytest.mark.numa
def test_a_model_is_removed_while_its_pages_move(pool: Tiered, readers: tuple[Reader, Reader], tmp_path: Path) -> None:
    others = [write_weights(tmp_path / f"short-lived-{i}", layers=4, layer_bytes=4 << 20) for i in range(3)]
    moved = pool.moved_pages
    pool.set_policy(RANDOM_MOVES)
    for other in others:
        pool.control.load(other.path)
        time.sleep(0.5)
        pool.control.remove(other.name)
        with pytest.raises(ModelNotFound):
            pool.tiers(other.name)
    assert pool.moved_pages > moved
    assert pool.migration()["policy_failure"] == ""
    assert readers[0].read_all(0).wrong == 0


@pytest.mark.numa
def test_a_daemon_killed_while_pages_move_is_followed_by_one_that_asks_the_kernel_where_they_are(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale
) -> None:
    pool.set_policy(RANDOM_MOVES)
    moved = pool.moved_pages
    for reader in readers:
        reader.verify(*range(scale.layers))
    pool.wait(lambda: pool.moved_pages > moved + 20, "pages move", SETTLE_S)
    pool.restart()
    for reader in readers:
        assert reader.read_all(scale.layers).nodes == pool.nodes(weights.name)
    assert {tier for tier in pool.tiers(weights.name)} == {"dram", "cxl"}
    pool.wait(lambda: pool.leases() == 2, "the clients announced their leases", SETTLE_S)


@pytest.mark.numa
def test_without_cap_sys_nice_only_pages_that_nobody_else_maps_move(tmp_path: Path) -> None:
    weights = write_weights(tmp_path / "model", layers=4, layer_bytes=2 << 20)
    rights = ("setpriv", "--bounding-set=-sys_nice")
    with Tiered("--sampler", "off", dram="32MiB", prefix=rights) as pool:  # a sampler unmaps pages at times
        with Reader(pool.address, weights) as reader:
            reader.ready().verify(0, 1, 2, 3)
            reader.read_all(8)
            pool.set_policy(ALL_SLOW)
            pool.wait(lambda: pool.refused.get("mapped by others", 0) > 0, "moves are refused", SETTLE_S)
            assert not pool.migration()["moves_shared"]
            assert reader.tell().nodes == [[0]] * 4
        pool.wait_for(weights.name, dict.fromkeys(range(4), "cxl"), SETTLE_S)


@pytest.mark.numa
@pytest.mark.parametrize("node", ["node7", "node0"])
def test_a_cxl_tier_on_a_node_that_is_none_is_refused(node: str) -> None:
    with (
        Daemon(tier=f"dram=64MiB,cxl=64MiB@{node}", start=False) as daemon,
        daemon.spawn() as child,
    ):
        assert child.exit_code(DEADLINE_S) == 2
        assert node in child.errors
        assert "daxctl" in child.errors


@pytest.mark.cxl
def test_a_node_goes_offline_and_comes_back(
    pool: Tiered, readers: tuple[Reader, Reader], weights: Weights, scale: Scale
) -> None:
    pool.set_policy(ALL_SLOW)
    pool.wait_for(weights.name, dict.fromkeys(scale.pages, "cxl"), SETTLE_S)
    for reader in readers:
        reader.verify(*range(scale.layers))
    pool.hold()
    with offline(1):
        pool.wait_for(weights.name, dict.fromkeys(scale.pages, "dram"), SETTLE_S)
        assert readers[0].read_all(scale.layers).nodes == pool.nodes(weights.name)
        assert pool.child is not None
        assert pool.child.alive
    pool.set_policy(ALL_SLOW)
    pool.wait_for(weights.name, dict.fromkeys(scale.pages, "cxl"), SETTLE_S)
    # Of a page that the kernel had split a part may have stayed; it counts in the slower tier.
    assert all(nodes[-1] == 1 for nodes in readers[1].read_all(scale.layers).nodes)
