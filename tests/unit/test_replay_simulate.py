"""Simulation: figures against traces that were worked out by hand, and what must hold at every tick."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import Asked, setting, swap_at, trace
from tiermem.errors import ConfigError
from tiermem.observations import Rung
from tiermem.policy import Move, Plan, View
from tiermem.replay.baselines import NAMES, oracle, static_baselines
from tiermem.replay.generate import generate, workload
from tiermem.replay.result import Result, Ticks, convergence_s
from tiermem.replay.simulate import Simulation
from tiermem.replay.trace import Builder, Trace
from tiermem.runner import open_runner
from tiermem.types import PAGE_BYTES


def run(of: Trace, asked: Asked, fast: int = 2, quota: int = 1000, sampling: str = "exact") -> Result:
    return Simulation(of, setting(of, fast, quota, sampling), asked).run()


EVERY_SECOND = [(i + 0.5, [0, 1, 2, 3]) for i in range(10)]


def test_hits_are_touches_of_pages_that_are_in_the_fastest_tier() -> None:
    # Pages 0 and 1 are there from the start; from the tick at 4 s on, 3 is there for 0: 2 of 4 at any time.
    held = run(trace([(i + 0.5, [0, 1, 2]) for i in range(10)]), Asked(lambda view: []))
    assert held.hit_ratio == pytest.approx(2 / 3)
    swapped = run(trace([(i + 0.5, [0, 3]) for i in range(10)]), Asked(swap_at(4.0, out=1, into=3)))
    assert swapped.hit_ratio == pytest.approx((10 + 6) / 20)
    assert (swapped.moved_bytes, swapped.promoted_bytes, swapped.useful_bytes) == (
        2 * PAGE_BYTES, PAGE_BYTES, PAGE_BYTES)  # fmt: skip


def test_a_page_is_read_where_it_was_until_its_move_is_done() -> None:
    # 4 pages a second: the demotion has arrived at 1.25 s, the promotion at 1.5 s.
    at = [1.2, 1.3, 1.45, 1.55]
    plan = swap_at(1.0, out=1, into=3)
    assert run(trace([(t, [3]) for t in at]), Asked(plan), quota=4).hit_ratio == pytest.approx(1 / 4)
    assert run(trace([(t, [1]) for t in at]), Asked(plan), quota=4).hit_ratio == pytest.approx(1 / 4)


def test_the_quota_ends_a_plan_and_the_rest_is_counted_as_late() -> None:
    def plan(view: View) -> Plan:
        return [Move(0, 2, 0, 1, "out"), Move(2, 2, 1, 0, "in")] if view.now_s == 0 else []

    for quota in (1, 2, 3):
        result = run(trace(EVERY_SECOND), Asked(plan), quota=quota)
        assert result.moved_bytes == quota * PAGE_BYTES
        assert result.refused == {"no time left": 4 - quota}


def test_a_quota_of_less_than_a_page_a_tick_adds_up() -> None:
    def plan(view: View) -> Plan:
        where = int(view.pages.tier[0])
        return [Move(0, 1, where, 1 - where, "again")]

    made = trace(EVERY_SECOND)
    simulation = Simulation(made, setting(made, 60, quota_pages_s=8), Asked(plan, period_s=0.05))
    result = simulation.run()
    assert 75 <= result.moved_bytes // PAGE_BYTES <= 80


def test_a_page_moves_once_in_a_plan() -> None:
    def plan(view: View) -> Plan:
        return [Move(0, 1, 0, 1, "out"), Move(0, 1, 1, 0, "in")] if view.now_s == 0 else []

    result = run(trace(EVERY_SECOND), Asked(plan))
    assert (result.moved_bytes, result.refused) == (PAGE_BYTES, {"ping-pong": 1})


def test_the_slower_tier_paces_moves_where_the_quota_does_not() -> None:
    made = trace([(0.5, [0])], pages=40_000, end_s=1.0)
    moved = run(made, Asked(lambda view: [Move(0, 19_000, 0, 1, "all")] if not view.now_s else []), 20_000, 10**6)
    assert moved.moved_bytes == pytest.approx(25e9, rel=0.01)  # one second of CXL


def test_a_page_does_not_go_back_within_the_guard() -> None:
    def back_and_forth(view: View) -> Plan:
        where = int(view.pages.tier[0])
        return [Move(0, 1, where, 1 - where, "again")]

    guarded = run(trace(EVERY_SECOND), Asked(back_and_forth, guard_s=5.0), fast=60)
    free = run(trace(EVERY_SECOND), Asked(back_and_forth), fast=60)
    assert (guarded.moved_bytes, guarded.ping_pongs) == (2 * PAGE_BYTES, 1)
    assert guarded.refused == {"ping-pong": 8}
    assert (free.moved_bytes, free.ping_pongs) == (10 * PAGE_BYTES, 9)


def test_promotions_leave_the_reserve_alone() -> None:
    made = trace([(0.5, [150])], pages=200)
    asked = Asked(lambda view: [Move(0, 5, 0, 1, "out"), Move(100, 7, 1, 0, "in")] if view.now_s == 1.0 else [])
    result = run(made, asked, fast=100)
    assert asked.views[0].tiers[0].free_bytes == asked.views[0].tiers[0].low_bytes == 2 * PAGE_BYTES
    assert result.promoted_bytes == 5 * PAGE_BYTES
    assert result.refused == {"no space": 2}


def test_promotions_that_are_not_read_are_of_no_use() -> None:
    wasted = run(trace([(5.5, [0])]), Asked(swap_at(1.0, out=1, into=3)))
    assert (wasted.promoted_bytes, wasted.useful_bytes) == (PAGE_BYTES, 0)

    def demoted_before(view: View) -> Plan:
        return {1.0: [Move(1, 1, 0, 1, "out"), Move(3, 1, 1, 0, "in")], 3.0: [Move(3, 1, 0, 1, "out")]}.get(
            view.now_s, [])  # fmt: skip

    assert run(trace([(3.5, [3])]), Asked(demoted_before)).useful_bytes == 0
    assert run(trace([(2.5, [3]), (3.5, [3])]), Asked(demoted_before)).useful_bytes == PAGE_BYTES


def test_a_policy_sees_what_a_pool_would_show_it() -> None:
    asked = Asked(lambda view: [])
    made = trace([(0.5, [0, 2]), (0.6, [2])], models=2)
    Simulation(made, setting(made, 3), asked).run()
    first, second = asked.views[:2]
    assert np.isnan(first.pages.rate).all()
    assert not first.pages.known.any()
    assert second.now_s == 1.0
    assert second.pages.rate.tolist() == [1, 0, 2, 0, 0, 0, 0, 0]
    assert second.pages.observed.tolist() == [1, 0, 2, 0, 0, 0, 0, 0]
    assert (second.pages.rung == Rung.PERF).all()
    assert second.pages.model.tolist() == [0] * 4 + [1] * 4
    assert second.pages.segment.tolist() == [0, 0, 1, 1] * 2
    assert second.pages.tier.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [tier.name for tier in second.tiers] == ["dram", "cxl", "disk"]
    assert second.tiers[0].free_bytes == 0
    assert second.tiers[0].load == pytest.approx(3 * PAGE_BYTES / 100e9)
    assert second.tiers[0].latency_s > second.tiers[0].idle_latency_s
    assert second.models.rate.tolist() == [3, 0]
    assert second.quota_bytes == 1000 * PAGE_BYTES
    for column in (second.pages.tier, second.pages.rate, second.models.opens):
        assert not column.flags.writeable


def test_uses_show_as_leases_from_the_next_tick_on() -> None:
    made = generate(workload("switch", nbytes=1 << 30, duration_s=20.0, models=10))
    asked = Asked(lambda view: [])
    Simulation(made, setting(made, 100), asked).run()
    for view in asked.views:
        done = made.use_s <= view.now_s
        readers = np.bincount(made.use_model[done], made.use_change[done], len(made.names))
        assert (view.pages.leased == (readers > 0)[view.pages.model]).all()
        assert view.models.opens.sum() == (made.use_change[done] > 0).sum()
        opened = np.isin(view.pages.model, made.use_model[done])
        assert (np.isfinite(view.pages.age_s) == opened).all()
        assert (view.pages.last_used_s[opened] > 0).all()


def test_a_model_that_is_opened_at_a_tick_is_leased_in_its_view() -> None:
    builder = Builder()
    builder.add_model("m", np.zeros(2), np.arange(2), np.zeros(2))
    builder.add_use(0, 3.0, 5.0)
    made = builder.finish({}, 8.0)
    asked = Asked(lambda view: [])
    Simulation(made, setting(made, 1), asked).run()
    assert [bool(view.pages.leased.all()) for view in asked.views] == [3 <= second < 5 for second in range(8)]
    assert asked.views[3].pages.last_used_s.tolist() == [3.0, 3.0]


def test_present_tells_one_bit_of_the_pages_whose_turn_it_is() -> None:
    asked = Asked(lambda view: [])
    made = trace([(i / 20 + 0.01, [0]) for i in range(199)], pages=4096)
    Simulation(made, setting(made, 8, sampling="present"), asked).run()
    last = asked.views[1].pages
    assert last.known.any()
    assert asked.views[1].pages.known.mean() == 1.0  # 10 turns of 512: more than all
    assert asked.views[-1].pages.observed[0] < 20
    assert (last.rung == Rung.PRESENT).all()
    assert np.flatnonzero(asked.views[-1].pages.observed).tolist() == [0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_whatever_is_planned_pages_are_conserved_and_no_tier_overflows(seed: int) -> None:
    random = np.random.default_rng(seed)
    made = trace([(i / 4, random.choice(60, 7, replace=False).tolist()) for i in range(40)], pages=60)

    def any_plan(view: View) -> Plan:
        simulation.residency.check()
        plan, free = [], [tier.free_bytes // PAGE_BYTES for tier in view.tiers[:2]]
        for page in random.permutation(60)[:30].tolist():
            source = int(view.pages.tier[page])
            if free[1 - source]:
                plan.append(Move(page, 1, source, 1 - source, "why not"))
                free[source] += 1
                free[1 - source] -= 1
        return plan

    asked = Asked(any_plan, period_s=float(random.choice([0.3, 1.0])), guard_s=float(random.choice([0.0, 2.0])))
    simulation = Simulation(made, setting(made, 20, quota_pages_s=int(random.integers(1, 40))), asked)
    result = simulation.run()
    simulation.residency.check()
    assert result.failure == ""
    assert result.timeline is not None
    assert result.timeline.reads.sum() == made.touches
    assert (result.timeline.moved * PAGE_BYTES).max() <= 40 * PAGE_BYTES * asked.period_s
    assert result.useful_bytes <= result.promoted_bytes <= result.moved_bytes


def test_a_policy_that_fails_is_replaced_by_hold_and_named() -> None:
    def fails(view: View) -> Plan:
        return swap_at(1.0, out=1, into=3)(view) if view.now_s < 3 else [1 // 0]  # type: ignore[list-item]

    result = run(trace([(i + 0.5, [3]) for i in range(10)]), Asked(fails))
    assert "division" in result.failure
    assert result.ticks == 4
    assert result.hit_ratio == pytest.approx(9 / 10)


@pytest.mark.parametrize(
    ("body", "what"),
    [("raise KeyError('boom')", "boom"), ("while True: pass", "longer"), ("return 7", "list of moves"),
     ("import os; os._exit(3)", "plan")],
)  # fmt: skip
def test_a_file_that_misbehaves_is_replaced_by_hold(tmp_path: Path, body: str, what: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(f"class Bad:\n    def plan(self, view):\n        {body}\n")
    made = trace(EVERY_SECOND)
    runner = open_runner(str(path), 0.3)
    try:
        result = Simulation(made, setting(made, 2), runner).run()
    finally:
        runner.close()
    assert what in result.failure
    assert result.hit_ratio == 0.5


def test_a_file_runs_as_a_shipped_policy_does(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from tiermem.policy import moves\nclass Mine:\n    period_s = 2.0\n    def plan(self, view):\n"
        "        return moves(view, [1], 1, 'out') + moves(view, [3], 0, 'in') if view.now_s == 2 else []\n"
    )
    made = trace([(i + 0.5, [3]) for i in range(10)])
    runner = open_runner(str(path), 5.0)
    try:
        result = Simulation(made, setting(made, 2), runner).run()
    finally:
        runner.close()
    assert (result.failure, result.ticks) == ("", 5)
    assert result.hit_ratio == pytest.approx(8 / 10)


def small_moe() -> Trace:
    return generate(workload("moe", nbytes=2 << 30, duration_s=40.0, layers=4, experts=32, top_k=2))


@pytest.mark.parametrize("sampling", ["exact", "present"])
def test_equal_seeds_give_equal_results(sampling: str) -> None:
    made = small_moe()
    results = []
    for _ in range(2):
        runner = open_runner("memtis", 5.0)
        facts = Simulation(made, setting(made, made.pages // 4, 64, sampling, seed=3), runner).run().facts()
        results.append({name: value for name, value in facts.items() if not name.startswith("policy_")})
    assert results[0] == results[1]
    assert results[0]["moved_bytes"] > 0


@pytest.mark.parametrize("policy", ["hold", "lru", "memtis"])
def test_the_oracle_is_not_beaten_without_prefetching(policy: str) -> None:
    made = small_moe()
    conditions = setting(made, made.pages // 4, 64)
    assert Simulation(made, conditions, open_runner(policy, 5.0)).run().hit_ratio <= oracle(made, conditions).hit_ratio


def test_baselines_bound_every_policy() -> None:
    made = small_moe()
    conditions = setting(made, made.pages // 2)
    rows = {row.policy: row for row in (*static_baselines(made, conditions), oracle(made, conditions))}
    assert tuple(rows) == NAMES
    assert (rows["all-fast"].hit_ratio, rows["all-fast"].slowdown) == (1.0, 1.0)
    assert (rows["all-slow"].hit_ratio, rows["all-slow"].slowdown) == (0.0, pytest.approx(4.0))
    assert rows["interleave"].hit_ratio == pytest.approx(0.5, abs=0.01)
    touches = np.sort(np.bincount(made.page, minlength=made.pages))
    assert rows["best-static"].hit_ratio == pytest.approx(touches[-(made.pages // 2) :].sum() / made.touches)
    assert rows["interleave"].hit_ratio < rows["best-static"].hit_ratio < rows["oracle"].hit_ratio < 1
    hit = rows["oracle"].hit_ratio
    assert rows["oracle"].slowdown == pytest.approx(hit + 4 * (1 - hit))


def test_moves_take_bandwidth_from_reads() -> None:
    made = trace([(0.5, list(range(4000)))], pages=16_000, end_s=1.0)
    still = run(made, Asked(lambda view: []), fast=8000)
    moving = run(made, Asked(lambda view: [Move(5000, 1000, 0, 1, "out")]), fast=8000)
    assert (still.slowdown, still.hit_ratio, moving.hit_ratio) == (1.0, 1.0, 1.0)
    assert moving.slowdown == pytest.approx(100e9 / (100e9 - 1000 * PAGE_BYTES))


def test_a_trace_that_would_take_for_ever_is_refused() -> None:
    with pytest.raises(ConfigError, match="periods of"):
        run(trace([(0.5, [0])], end_s=9e8), Asked(lambda view: []))


def timeline(hits: list[int], reads: int = 100) -> Ticks:
    numbers = np.array(hits, np.int64)
    return Ticks(np.arange(len(hits), dtype=np.float64), np.full(len(hits), reads), numbers, numbers * 0)


def test_convergence_is_when_hits_reach_those_of_the_end() -> None:
    assert convergence_s(timeline([80] * 20 + [10] * 10 + [80] * 30), 20.0, 60.0) == 10.0
    assert convergence_s(timeline([80] * 60), 20.0, 60.0) == 0.0
    assert convergence_s(timeline([0] * 60), 20.0, 60.0) is None


def test_json_has_no_nan() -> None:
    facts = Result("p", math.nan, 1.0).facts()
    assert facts["hit_ratio"] is None
    assert "timeline" not in facts
