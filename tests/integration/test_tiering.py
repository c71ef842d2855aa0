"""A pool with two memory tiers: pages are placed and moved as the policy says, and everybody tells the same of them."""

from __future__ import annotations

import gc
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Checkpoint, CheckpointWriter, until
from tests.integration.conftest import PoolMaker
from tests.integration.test_pool_crowd import Crowd
from tests.integration.two_nodes import TwoNodes
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CapacityError, ModelNotFound
from tiermem.types import PAGE_BYTES

PAGE_KIB = PAGE_BYTES >> 10

ALTERNATING = """
import numpy as np
class Alternating:
    def plan(self, view):
        return []
    def place(self, request):
        return np.arange(len(request), dtype=np.int8) % 2
"""

UP_AND_DOWN = """
import numpy as np
from tiermem.policy import moves
class UpAndDown:
    period_s = 0.01
    guard_s = {guard}
    def plan(self, view):
        fast, slow = view.memory_tiers
        first = np.flatnonzero(view.movable & (view.pages.order == 0))
        tier = view.pages.tier[first]
        return moves(view, first[tier == 0], 1, "goes down") + moves(view, first[tier == 1], 0, "goes up")
"""

RANDOM = """
import numpy as np
from tiermem.policy import evictions, moves
class Random:
    period_s = 0.02
    guard_s = 0.0
    def __init__(self):
        self.random = np.random.default_rng(20)
    def plan(self, view):
        fast, slow = view.memory_tiers
        gone = evictions(view)
        if gone:
            return gone
        rows = self.random.permutation(np.flatnonzero(view.movable))[:12]
        tier = view.pages.tier[rows]
        down = rows[tier == fast.id][: max(0, slow.free_bytes) // (2 << 20)]
        up = rows[tier == slow.id][: max(0, fast.free_bytes) // (2 << 20)]
        return moves(view, down, slow.id, "drawn") + moves(view, up, fast.id, "drawn")
    def place(self, request):
        free = [max(0, tier.free_bytes) // (2 << 20) for tier in request.tiers[:2]]
        placed = np.full(len(request), -1, np.int8)
        for i in self.random.permutation(len(request)):
            tier = int(self.random.integers(2))
            tier = tier if free[tier] else 1 - tier
            if free[tier]:
                placed[i] = tier
                free[tier] -= 1
        return placed
"""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    return TwoNodes(monkeypatch)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return tmp_path / "mine.py"


def two(dram_pages: int, cxl_pages: int) -> str:
    return f"dram={dram_pages * PAGE_BYTES}B,cxl={cxl_pages * PAGE_BYTES}B"


def tiers(pool: EmbeddedPool, name: str) -> list[str]:
    """The tier of each page, as heat tells it."""
    heat = pool.heat(name)
    return [heat.tiers[tier] for tier in heat.tier]


def really(pool: EmbeddedPool, nodes: TwoNodes, name: str) -> list[str]:
    """The same, as the kernel has it."""
    with pool._pool.lock:
        record = pool._pool.catalog.named(name)
        segments = zip(record.keys, record.manifest.segments, strict=True)
        return [tier for key, info in segments for tier in nodes.tiers_of(key or "", info.pages)]


def used(pool: EmbeddedPool) -> list[int]:
    return [tier["used_bytes"] // PAGE_BYTES for tier in pool.status()["tiers"][:2]]


def test_the_fastest_tier_is_filled_first(embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes) -> None:
    written = checkpoint(layers=3, kib=PAGE_KIB)
    pool = embedded(tier=two(4, 8), policy="hold")
    with pool.open(written.path) as model:
        assert written.same(model)
    assert tiers(pool, "model") == really(pool, nodes, "model") == ["dram"] * 4 + ["cxl"] * 2
    assert used(pool) == [4, 2]
    (entry,) = pool.status("model")["models"]
    assert entry["residency"] == {"model.layers.0": "dram", "model.layers.1": "dram", "model.layers.2": "cxl"}
    by_name = {tier["name"]: tier for tier in pool.status()["tiers"]}
    assert [by_name[name]["nodes"] for name in ("dram", "cxl", "disk")] == [[0], [1], []]


def test_a_policy_places_each_page(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    policy.write_text(ALTERNATING)
    written = checkpoint(layers=2, kib=PAGE_KIB)
    pool = embedded(tier=two(8, 8), policy=str(policy), policy_budget="5s")
    with pool.open(written.path) as model:
        assert written.same(model)
        model.wait()
        assert model.residency() == {"model.layers.0": "dram+cxl", "model.layers.1": "dram+cxl"}
    assert tiers(pool, "model") == really(pool, nodes, "model") == ["dram", "cxl"] * 2
    assert pool.evict("model") == 4 * PAGE_BYTES
    assert used(pool) == [0, 0]
    assert tiers(pool, "model") == ["disk"] * 4


def test_a_kernel_that_puts_pages_elsewhere_is_believed(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0 had no memory left: what was meant for DRAM went to node 1, and back later."""
    monkeypatch.setattr(nodes, "where", lambda segment, first, count: np.full(count, 1, np.int16))
    pool = embedded(tier=two(8, 8), policy="hold")
    pool.load(checkpoint(layers=2, kib=PAGE_KIB).path)
    assert tiers(pool, "model") == ["cxl"] * 4
    assert used(pool) == [0, 4]
    monkeypatch.setattr(nodes, "where", lambda segment, first, count: np.full(count, 0, np.int16))
    until(lambda: used(pool) == [4, 0])
    pool._pool.check()


def test_both_tiers_are_full_before_a_load_is_refused(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes
) -> None:
    pool = embedded(tier=two(3, 4))
    first, second, large = (
        checkpoint(name, layers=layers, kib=PAGE_KIB, seed=layers) for name, layers in (("a", 2), ("b", 1), ("c", 4))
    )
    pool.load(first.path)
    pool.load(second.path)
    assert used(pool) == [3, 3]
    with pytest.raises(CapacityError, match=r"c needs 16\.0 MiB of tiers 'dram', 'cxl', which has 2\.0 MiB free of 14"):
        pool.load(large.path)
    assert used(pool) == [3, 3], "nothing is evicted for what cannot fit"
    pool.open(second.path).close()
    until(lambda: pool.status()["pool"]["leases"] == 0)
    third = checkpoint("d", layers=1, kib=PAGE_KIB, seed=9)
    pool.load(third.path)
    assert tiers(pool, "a") == ["dram"] * 2 + ["disk"] * 2, "the last layer of what was unused for longest"
    assert used(pool) == [3, 3]
    with pool.open(third.path) as model:
        assert third.same(model)


def test_pages_move_under_their_readers_and_the_log_tells_why(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    policy.write_text(UP_AND_DOWN.format(guard=0.0))
    written = checkpoint(layers=2, kib=PAGE_KIB)
    pool = embedded(tier=two(8, 8), policy=str(policy), policy_budget="5s")
    with pool.open(written.path) as model:
        model.wait()
        until(lambda: len(pool.policy_log("model", 0)) >= 4)
        assert written.same(model)
    pool.set_policy("hold")
    until(lambda: tiers(pool, "model") == really(pool, nodes, "model"))
    entries = pool.policy_log("model")
    assert {(e.first, e.pages, e.source, e.target, e.reason, e.outcome) for e in entries} == {
        (0, 1, "dram", "cxl", "goes down", "moved"), (0, 1, "cxl", "dram", "goes up", "moved")
    }  # fmt: skip
    assert [e.source for e in entries[:4]] in (["dram", "cxl"] * 2, ["cxl", "dram"] * 2), "newest first"
    assert pool.policy_log("model", 1) == ()
    assert pool.policy_log("model", 0, limit=3) == entries[:3]
    with pytest.raises(ModelNotFound):
        pool.policy_log("absent")
    migration = pool.status()["migration"]
    assert migration["moved_bytes"] == sum(migration["moved_pages"].values()) * PAGE_BYTES
    assert set(migration["moved_pages"]) == {"dram->cxl", "cxl->dram"}
    assert pool.evict("model") == 4 * PAGE_BYTES
    assert {(e.target, e.reason, e.outcome) for e in pool.policy_log("model", limit=2)} == {
        ("disk", "asked for", "evicted")}  # fmt: skip


def test_pages_do_not_bounce_within_the_guard(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    policy.write_text(UP_AND_DOWN.format(guard=60.0))
    pool = embedded(tier=two(8, 8), policy=str(policy), policy_budget="5s")
    pool.load(checkpoint(layers=1, kib=PAGE_KIB - 1).path)
    until(lambda: pool.status()["migration"]["refused"].get("ping-pong", 0) >= 2)
    assert pool.status()["migration"]["moved_pages"] == {"dram->cxl": 1}


def test_the_quota_bounds_what_moves(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    policy.write_text(RANDOM)
    pool = embedded(tier=two(40, 40), policy=str(policy), policy_budget="5s", quota=20 * PAGE_BYTES)
    pool.load(checkpoint(layers=4, kib=4 * PAGE_KIB).path)
    begin_s, before = time.monotonic(), pool.status()["migration"]["moved_bytes"]
    time.sleep(1.0)
    moved = pool.status()["migration"]["moved_bytes"] - before
    assert 0 < moved <= (20 * (time.monotonic() - begin_s) + 32) * PAGE_BYTES


def test_random_moves_under_a_crowd(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    """Opens, loads, evictions and removals while pages move, some of them in vain and some by the kernel's own will."""
    policy.write_text(RANDOM)
    nodes.refuses, nodes.busy_s = 30, 0.002
    models: list[Checkpoint] = [checkpoint(f"m{i}", layers=2 + i % 3, kib=32 + 200 * (i % 2), seed=i) for i in range(6)]
    pool = embedded(tier=two(6, 7), policy=str(policy), policy_budget="5s", quota="64GiB", read_threads=3)
    crowd = Crowd(pool, models, seconds=4)

    def check(chance: random.Random) -> None:
        pool._pool.check()
        time.sleep(0.001)

    def wander(chance: random.Random) -> None:
        """The kernel moves a page of its own accord."""
        for place in chance.sample(list(nodes.nodes.copy()), 1) if nodes.nodes else ():
            nodes.nodes[place] = chance.randrange(2)
        time.sleep(0.005)

    crowd.rush([crowd.read] * 3 + [crowd.load] * 2 + [crowd.disturb, check, wander])
    assert crowd.reads > 50
    migration = pool.status()["migration"]
    assert migration["policy_failure"] == ""
    assert migration["moved_bytes"] > 20 * PAGE_BYTES
    gc.collect()
    until(lambda: pool.status()["pool"]["leases"] == 0 and not pool._pool.loads())
    pool.set_policy("hold")
    resident = [model["name"] for model in pool.status()["models"] if model["state"] == "resident"]
    for name in resident:
        until(lambda name=name: tiers(pool, name) == really(pool, nodes, name))  # type: ignore[misc]
    # Pages on their way are counted twice.
    until(lambda: sum(used(pool)) * PAGE_BYTES == sum(m["resident_bytes"] for m in pool.status()["models"]))
    pool._pool.check()


def test_a_pool_closes_while_pages_move(
    embedded: PoolMaker, checkpoint: CheckpointWriter, nodes: TwoNodes, policy: Path
) -> None:
    policy.write_text(RANDOM)
    nodes.busy_s = 0.2
    pool = embedded(tier=two(16, 16), policy=str(policy), policy_budget="5s")
    pool.load(checkpoint(layers=4, kib=PAGE_KIB).path)
    until(lambda: pool.status()["migration"]["ticks"] > 0)
    begin_s = time.monotonic()
    pool.close()
    assert time.monotonic() - begin_s < 5
    assert not [thread for thread in threading.enumerate() if thread.name == "tiermem-control"]
