"""A pool that holds only some of its models: what leaves, what stays, and what comes back."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import CheckpointWriter, dram, open_files, until
from tests.integration.conftest import PoolMaker
from tests.integration.gate import in_tmpfs, model_status, used
from tiermem.embedded import EmbeddedPool
from tiermem.errors import CapacityError, ConfigError, ModelNotFound, Refused
from tiermem.types import PAGE_BYTES

MIB = 1 << 20


def resident(pool: EmbeddedPool) -> dict[str, int]:
    return {model["name"]: model["resident_bytes"] // PAGE_BYTES for model in pool.status()["models"]}


def test_an_evicted_model_stays_known_and_comes_back(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(layers=3), embedded()
    pool.load(written.path)
    assert pool.evict("model") == 3 * PAGE_BYTES
    assert pool.evict("model") == 0
    assert used(pool) == 0
    status = model_status(pool, "model")
    assert (status["state"], status["ready_bytes"], set(status["residency"].values())) == ("disk", 0, {"disk"})
    with pool.open("model") as model:
        assert written.same(model)
    assert model_status(pool, "model")["last_load"]["read_bytes"] == written.nbytes


def test_only_what_is_missing_is_read_again(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    first, second = checkpoint("first", layers=4), checkpoint("second", layers=2, seed=1)
    pool = embedded(tier=dram(5 * PAGE_BYTES))
    pool.load(first.path)
    pool.load(second.path)
    assert resident(pool) == {"first": 3, "second": 2}, "one layer had to go for the second model, and no more"
    assert model_status(pool, "first")["residency"] == {
        "model.layers.0": "dram", "model.layers.1": "dram", "model.layers.2": "dram", "model.layers.3": "disk"
    }  # fmt: skip
    assert pool.status()["pool"]["evicted_bytes"] == PAGE_BYTES
    pool.remove("second")
    with pool.open("first") as model:
        assert first.same(model)
    layer = sum(array.nbytes for name, array in first.tensors.items() if ".3." in name)
    assert model_status(pool, "first")["last_load"]["read_bytes"] == layer


def test_the_model_that_was_used_longest_ago_goes_first(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    paths = [checkpoint(name, layers=2, seed=i).path for i, name in enumerate("abc")]
    pool = embedded(tier=dram(4 * PAGE_BYTES))
    for path in paths[:2]:
        pool.open(path).close()
        time.sleep(0.002)
    pool.open(paths[0]).close()
    until(lambda: pool.status()["pool"]["leases"] == 0 and not pool._pool.loads())
    pool.load(paths[2])
    assert resident(pool) == {"a": 2, "b": 0, "c": 2}


def test_leased_and_pinned_models_are_never_evicted(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    leased, pinned, third = (checkpoint(name, layers=2, seed=i) for i, name in enumerate(("leased", "pinned", "third")))
    pool = embedded(tier=dram(4 * PAGE_BYTES))
    pool.load(pinned.path)
    assert pool.pin("pinned") == 1
    assert pool.pin("pinned") == 2
    assert pool.unpin("pinned") == 1
    with pool.open(leased.path) as model:
        for _ in range(2):
            with pytest.raises(
                CapacityError,
                match=r"third needs 4\.0 MiB of tier 'dram', which has 0 B free of 8\.0 MiB, and the rest is leased, "
                r"pinned or held by the policy; unload a model or raise --tier",
            ):
                pool.open(third.path)
        assert leased.same(model)
    assert resident(pool) == {"leased": 2, "pinned": 2}
    for call in (pool.evict, pool.remove):
        with pytest.raises(Refused, match="pinned is pinned 1 times; unpin it first"):
            call("pinned")
    until(lambda: pool.status()["pool"]["leases"] == 0)
    with pool.open(third.path) as model:
        assert third.same(model)
    assert resident(pool)["pinned"] == 2
    assert pool.unpin("pinned") == 0
    with pytest.raises(Refused, match="pinned is not pinned"):
        pool.unpin("pinned")


def test_a_model_that_cannot_fit_is_refused_with_numbers_and_costs_nobody_a_page(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    idle, leased, large, huge = (
        checkpoint(name, layers=layers) for name, layers in (("idle", 2), ("leased", 2), ("large", 3), ("huge", 5))
    )
    pool = embedded(tier=dram(4 * PAGE_BYTES))
    pool.load(idle.path)
    with pytest.raises(CapacityError, match=r"huge needs 10\.0 MiB of tier 'dram', which has 4\.0 MiB free of 8\.0"):
        pool.load(huge.path)
    assert resident(pool) == {"idle": 2}
    with pool.open(leased.path) as model:
        model.wait()
        with pytest.raises(CapacityError, match=r"large needs 6\.0 MiB"):
            pool.load(large.path)
    assert resident(pool) == {"idle": 2, "leased": 2}, "evicting the idle one would not have been enough"
    pool._pool.check()
    with pytest.raises(ModelNotFound):
        pool.open("large")


def test_a_partly_evicted_model_comes_back_to_many_readers(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, filler = checkpoint("wanted", layers=6), checkpoint("filler", layers=3, seed=5)
    pool = embedded(tier=dram(6 * PAGE_BYTES), read_threads=3)
    barrier, right = threading.Barrier(6), []

    def read() -> None:
        barrier.wait(10)
        with pool.open("wanted") as model:
            right.append(written.same(model))

    for round_ in range(4):
        pool.load(written.path)
        pool.load(filler.path)
        assert resident(pool)["wanted"] == 3
        threads = [threading.Thread(target=read, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert right == [True] * 6 * (round_ + 1)
        until(lambda: pool.status()["pool"]["leases"] == 0)
        assert model_status(pool, "wanted")["last_load"]["read_bytes"] == written.nbytes // 2
        pool._pool.check()


def test_an_array_outlives_the_eviction_of_its_model(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    written, pool = checkpoint(), embedded()
    model = pool.open(written.path)
    array = model["model.layers.1.weight"]
    model.close()
    until(lambda: pool.status()["pool"]["leases"] == 0)
    pool.evict("model")
    with pool.open("model") as again:
        assert written.same(again)
    assert np.array_equal(array, written.tensors["model.layers.1.weight"])


@pytest.mark.root
def test_memory_that_closed_models_still_map_is_a_lack_and_no_crash(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    """The tier has the room, the host has it only when the last array goes."""
    first, second = checkpoint("first", layers=3), checkpoint("second", layers=3, seed=1)
    pool = embedded(tier=dram(3 * PAGE_BYTES))
    with pool.open(first.path) as model:
        array = model["model.layers.0.weight"]
    del model
    until(lambda: pool.status()["pool"]["leases"] == 0)
    with pytest.raises(CapacityError, match="could not be had"):
        pool.load(second.path)
    assert np.array_equal(array, first.tensors["model.layers.0.weight"])
    pool._pool.check()
    del array
    gc.collect()
    assert pool.load(second.path) == "second"


# --- the policy -----------------------------------------------------------------------------------------------------


POLICY = """
class Mine:
    def plan(self, view):
        {body}
"""


@pytest.mark.parametrize(
    ("body", "failure"),
    [("raise KeyError('heat')", "KeyError: 'heat'"), ("return None", "must return a list of moves, not NoneType"),
     ("return [1]", "it is no tiermem.policy.Move"),
     ("view.pages.tier[:] = 0", "ValueError: assignment destination is read-only")],
)  # fmt: skip
def test_a_policy_that_fails_is_reported_and_nothing_moves_any_more(
    embedded: PoolMaker, checkpoint: CheckpointWriter, tmp_path: Path, body: str, failure: str
) -> None:
    (tmp_path / "mine.py").write_text(POLICY.format(body=body))
    first, second = checkpoint("first"), checkpoint("second", seed=1)
    pool = embedded(tier=dram(2 * PAGE_BYTES), policy=str(tmp_path / "mine.py"))
    pool.load(first.path)
    assert pool.status()["migration"]["policy_failure"] == ""
    for _ in range(2):
        with pytest.raises(CapacityError, match="held by the policy"):
            pool.open(second.path)
        migration = pool.status()["migration"]
        assert failure in migration["policy_failure"]
        assert (migration["plans"], migration["failures"]) == (1, 1)
    assert resident(pool) == {"first": 2}
    assert pool.status()["pool"]["leases"] == 0
    assert pool.evict("first") == 2 * PAGE_BYTES, "what a user asks for needs no policy"
    assert pool.load(second.path) == "second"


def test_a_policy_cannot_evict_what_is_leased(
    embedded: PoolMaker, checkpoint: CheckpointWriter, tmp_path: Path
) -> None:
    everything = "from tiermem.policy import Move\n" + POLICY.format(
        body="return [Move(row, 1, 0, 1, 'all of it') for row in range(len(view.pages) - 1, -1, -1)]"
    )
    (tmp_path / "mine.py").write_text(everything)
    leased, idle, third = (checkpoint(name, seed=i) for i, name in enumerate(("leased", "idle", "third")))
    pool = embedded(tier=dram(4 * PAGE_BYTES), policy=str(tmp_path / "mine.py"))
    with pool.open(leased.path) as model:
        model.wait()
        pool.load(idle.path)
        with pytest.raises(CapacityError, match="held by the policy"):
            pool.load(third.path)
        assert resident(pool) == {"leased": 2, "idle": 2}, "nothing is done of a plan that cannot be"
        assert leased.same(model)
    assert "its model is leased" in pool.status()["migration"]["policy_failure"]
    assert pool.set_policy("lru") == ()
    assert pool.load(third.path) == "third"
    assert pool.status()["migration"]["policy_failure"] == ""


def test_hold_keeps_what_is_there(embedded: PoolMaker, checkpoint: CheckpointWriter) -> None:
    pool = embedded(tier=dram(2 * PAGE_BYTES), policy="hold")
    pool.load(checkpoint("first").path)
    with pytest.raises(CapacityError):
        pool.load(checkpoint("second", seed=1).path)
    assert resident(pool) == {"first": 2}


def test_a_bad_policy_stops_the_start_before_anything_is_made(embedded: PoolMaker, tmp_path: Path) -> None:
    before = open_files()
    with pytest.raises(ConfigError, match="no such file"):
        embedded(policy=str(tmp_path / "absent.py"))
    assert open_files() == before


# --- spare memory ---------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_spare_memory_fills_is_used_and_never_exceeds_the_tier(
    embedded: PoolMaker, checkpoint: CheckpointWriter
) -> None:
    capacity = 40 * MIB
    models = [checkpoint(f"m{i}", layers=6, seed=i) for i in range(4)]
    pool = embedded(tier=dram(capacity), spare="32MiB")
    assert pool.status()["pool"]["backing"] == "tmpfs"
    until(lambda: pool.status()["spare"]["ready_bytes"] == 32 * MIB)
    until(lambda: pool.status()["spare"]["prefault_s"] > 0)
    assert pool.status()["spare"]["target_bytes"] == 32 * MIB
    assert in_tmpfs(pool) == 32 * MIB
    stop, most = threading.Event(), [0]

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], in_tmpfs(pool))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for written in models * 3:
        with pool.open(written.path) as model:
            assert written.same(model)
        del model
    stop.set()
    watcher.join(10)
    assert 32 * MIB < most[0] <= capacity, f"{most[0] / MIB} MiB"
    until(lambda: pool.status()["pool"]["leases"] == 0)
    pool._pool.check()
    room = capacity - used(pool)
    until(lambda: pool.status()["spare"]["ready_bytes"] == min(32 * MIB, room))
    assert in_tmpfs(pool) == used(pool) + pool.status()["spare"]["ready_bytes"]


@pytest.mark.root
def test_a_load_gets_its_memory_although_the_stock_had_filled_the_tier(
    embedded: PoolMaker, checkpoint: CheckpointWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of filling that was decided before the load began, and was carried out after it took from the stock."""
    written, pool = checkpoint(layers=8), embedded(tier="dram=16MiB", spare="16MiB", read_threads=1)
    until(lambda: pool.status()["spare"]["ready_bytes"] == 16 * MIB)
    stock = pool._pool.spare.stock
    take, calls = stock.take, []

    def late(nbytes: int) -> int:
        calls.append(nbytes)
        return 0 if len(calls) == 1 else take(nbytes)

    monkeypatch.setattr(stock, "take", late)
    with pool.open(written.path) as model:
        assert written.same(model)
    assert len(calls) > 1
