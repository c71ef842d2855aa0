"""Each shipped policy decides as it promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.policies.colloid import Colloid
from tiermem.policies.hemem import Hemem
from tiermem.policies.hold import Hold
from tiermem.policies.layer_prefetch import LayerPrefetch
from tiermem.policies.lru import Lru
from tiermem.policies.memtis import Memtis
from tiermem.policies.static_interleave import StaticInterleave
from tiermem.policies.tpp import Tpp
from tiermem.policy import PAGE_DTYPES, Models, Pages, Plan, TierView, View, check_plan
from tiermem.policy.sample import sample_request
from tiermem.types import PAGE_BYTES

ALL = (Hold, Lru, Hemem, Memtis, Tpp, Colloid, LayerPrefetch, StaticInterleave)
MOVING = (Lru, Hemem, Memtis, Tpp, Colloid, LayerPrefetch)
FAST, SLOW, DISK = 0, 1, 2
NAN = float("nan")


def tiers_of(
    capacities: tuple[int, ...], tier: Any, low: int = 0, high: int = 0, **columns: Any
) -> tuple[TierView, ...]:
    """Memory tiers of so many pages, and a disk; watermarks are those of the first tier."""
    used = [int((np.asarray(tier) == number).sum()) * PAGE_BYTES for number in range(len(capacities) + 1)]
    memory = tuple(
        TierView(
            number, f"t{number}", "dram" if number == 0 else "cxl", capacity * PAGE_BYTES, used[number],
            (low if number == 0 else 0) * PAGE_BYTES, (high if number == 0 else 0) * PAGE_BYTES,
            **{name: values[number] for name, values in columns.items()},
        )
        for number, capacity in enumerate(capacities)
    )  # fmt: skip
    return (*memory, TierView(len(capacities), "disk", "disk", None, used[-1]))


def view_of(
    tier: list[int], *, capacities: tuple[int, ...] = (4, 100), now_s: float = 100.0, low: int = 0, high: int = 0,
    quota: int = 1 << 40, period_s: float = 1.0, needed: int = 0, tier_columns: dict[str, Any] | None = None,
    **given: Any,
) -> View:  # fmt: skip
    """One leased model of one page a segment, all sampled just now and never touched; columns as given."""
    count = len(tier)
    columns: dict[str, Any] = {
        "id": range(count), "model": 0, "segment": range(count), "layer": range(count), "order": range(count),
        "tensor_class": 0, "tier": tier, "replicas": 0, "rate": 0.0, "observed": 0, "age_s": NAN, "last_seen_s": NAN,
        "sampled_age_s": 0.0, "rung": 3, "known": True, "last_used_s": 0.0, "leased": True, "pinned": False,
    }  # fmt: skip
    arrays = {
        name: np.broadcast_to(np.array((columns | given)[name], dtype), count).copy()
        for name, dtype in PAGE_DTYPES.items()
    }
    count_models = int(arrays["model"].max()) + 1 if count else 0
    models = Models(
        tuple(f"m{number}" for number in range(count_models)), np.full(count_models, PAGE_BYTES),
        np.zeros(count_models, np.int64), np.full(count_models, 0.0), np.zeros(count_models),
    )  # fmt: skip
    tiers = tiers_of(capacities, tier, low, high, **(tier_columns or {}))
    return View(now_s, tiers, models, Pages(**arrays), needed * PAGE_BYTES, quota * PAGE_BYTES, period_s)


def after(view: View, plan: Plan) -> View:
    """The view once the plan has been carried out, a period later."""
    tier = view.pages.tier.copy()
    used = {t.id: t.used_bytes for t in view.tiers}
    for move in plan:
        for row in range(move.first, move.first + move.pages):
            used[int(tier[row])] -= PAGE_BYTES
            used[move.target] += PAGE_BYTES
            tier[row] = move.target
    tiers = tuple(replace(t, used_bytes=used[t.id]) for t in view.tiers)
    return replace(view, tiers=tiers, pages=replace(view.pages, tier=tier), now_s=view.now_s + view.period_s)


def rows(plan: Plan, target: int) -> list[int]:
    """Rows that go there, in the order of the plan."""
    return [row for move in plan if move.target == target for row in range(move.first, move.first + move.pages)]


def counted(policy: Any, view: View, touches: list[int]) -> Plan:
    """The plan of the second view, by when so many touches of each page were observed."""
    policy.plan(view)
    later = replace(view.pages, observed=view.pages.observed + np.array(touches, np.uint32))
    return check_plan(view, policy.plan(replace(view, now_s=view.now_s + 1, pages=later)))


FULL = [FAST] * 4 + [SLOW] * 4


def test_hold_moves_nothing_even_under_pressure() -> None:
    assert Hold().plan(view_of(FULL, age_s=range(8), needed=100, leased=False)) == []


def test_lru_gives_what_was_just_touched_the_places_of_what_was_not_for_longest() -> None:
    plan = Lru().plan(view_of(FULL, age_s=[50, 0.1, 40, 1.5, 0.2, 0.5, 9, NAN]))
    assert (rows(plan, SLOW), rows(plan, FAST)) == ([0, 2], [4, 5])
    assert plan[0].reason == "unused for 50.0 s to unused for 40.0 s, gives way to unused for 0.5 s to unused for 0.2 s"


def test_lru_gives_down_the_last_layer_first_among_equals() -> None:
    assert sorted(rows(Lru().plan(view_of(FULL, low=1, high=2, age_s=5.0)), SLOW)) == [2, 3]


def test_unknown_is_not_cold() -> None:
    """Row 3 was asked for long ago and nobody sampled it: it stays, and the page known to be cold goes."""
    known = [True, True, True, False, True, True, True, True]
    view = view_of(FULL, low=1, high=1, age_s=[5, 6, 7, 90, 9, 9, 9, 9], known=known, rung=[3, 3, 3, 1, 3, 3, 3, 3])
    for policy in (Lru, Hemem, Tpp):
        assert rows(policy().plan(view), SLOW) == [2], policy


def test_hemem_promotes_at_eight_samples_and_demotes_the_oldest_cold() -> None:
    plan = counted(Hemem(), view_of(FULL, age_s=[9, 30, 20, 1, 0, 0, 0, 0]), [0, 7, 0, 9, 8, 7, 0, 0])
    assert (rows(plan, SLOW), rows(plan, FAST)) == ([1], [4])
    assert plan[1].reason == "hot with 8 samples, in place of cold, unused for 30.0 s"


def test_hemem_stops_where_no_page_is_cold() -> None:
    assert counted(Hemem(), view_of(FULL), [9, 9, 9, 9, 18, 0, 0, 0]) == []


def test_hemem_cools_all_counts_when_one_grows_too_large() -> None:
    """19 samples halve the 14 of row 4 to 7, which is not hot; 18 do not."""
    assert counted(Hemem(), view_of(FULL), [19, 0, 0, 0, 14, 0, 0, 0]) == []
    assert rows(counted(Hemem(), view_of(FULL), [18, 0, 0, 0, 14, 0, 0, 0]), FAST) == [4]


def test_memtis_sets_its_threshold_so_that_the_hot_pages_fit() -> None:
    """Of 10 places 9 may be filled: the bins from 15 up hold 6 pages, those from 7 up 12, so 15 is hot and 7 is not."""
    tier = [FAST] * 10 + [SLOW] * 12
    touches = [20, 20, 20, 1, 1, 1, 1, 1, 1, 1] + [20, 20, 20] + [10] * 6 + [0] * 3
    plan = counted(Memtis(), view_of(tier, capacities=(10, 50)), touches)
    assert sorted(rows(plan, FAST)) == [10, 11, 12]
    assert set(rows(plan, SLOW)) <= set(range(3, 10))


def test_memtis_raises_its_threshold_at_once_and_lowers_it_by_one_bin_at_a_cooling() -> None:
    policy = Memtis()
    view = view_of([FAST] * 10 + [SLOW] * 12, capacities=(10, 50))
    counted(policy, view, [60] * 22)  # all in the bin of 31 to 62, which does not fit
    assert policy._threshold == {"t0": 6}
    roomy = view_of([FAST] * 10 + [SLOW] * 12, capacities=(100, 50), observed=60)
    assert policy.plan(roomy) == []
    assert policy._threshold == {"t0": 6}
    counted(policy, roomy, [5] * 22)  # 64 a page have come together
    assert policy._threshold == {"t0": 5}


def test_tpp_promotes_at_the_second_touch_and_demotes_what_two_passes_missed() -> None:
    policy, observed = Tpp(), np.zeros(8, np.uint32)
    view = view_of(FULL, rate=5.0, age_s=[0, 40, 50, 60, 0, 0, 9, 9])
    policy.plan(view)
    plans = []
    for number, touched in enumerate(([0, 4], [0, 4], [0, 5])):
        observed = observed.copy()
        observed[touched] += 1
        plans.append(policy.plan(replace(view, now_s=101.0 + number, pages=replace(view.pages, observed=observed))))
    assert plans[0] == []
    assert rows(plans[1], FAST) == [4]
    assert rows(plans[1], SLOW) == [3]  # not row 0, which is active
    assert plans[2] == []


def test_tpp_demotes_ahead_of_need_from_the_low_watermark_to_the_high() -> None:
    view = view_of(FULL, low=1, high=2, age_s=[1, 9, 2, 8, 1, 1, 1, 1])
    assert sorted(rows(Tpp().plan(view), SLOW)) == [1, 3]
    assert Tpp().plan(replace(view, tiers=tiers_of((5, 100), FULL, 1, 2))) == []


def test_tpp_shortens_its_threshold_while_candidates_exceed_the_quota() -> None:
    policy, view = Tpp(), view_of(FULL, quota=1, rate=5.0)
    for second in range(70):
        pages = replace(view.pages, observed=np.full(8, second, np.uint32))
        policy.plan(replace(view, now_s=100.0 + second, pages=pages))
    assert policy._latency_s == pytest.approx(Tpp.default_latency_s * (1 - 2 / Tpp.steps))


def balanced(fast_ns: float, slow_ns: float, rate: list[float]) -> View:
    return view_of(FULL, rate=rate, tier_columns={"latency_s": (fast_ns * 1e-9, slow_ns * 1e-9)})


def test_colloid_leaves_equal_latencies_alone() -> None:
    assert Colloid().plan(balanced(100, 104, [1, 1, 1, 1, 9, 9, 9, 9])) == []


def test_colloid_moves_accesses_to_the_tier_that_is_faster_now() -> None:
    rate = [30, 20, 10, 4, 30, 20, 10, 1]
    up = Colloid().plan(balanced(90, 250, rate))
    assert rows(up, FAST) == [4]  # a quarter of all accesses is to go up, 31 of 125: row 4 for row 3 brings 26
    assert rows(up, SLOW) == [3]
    down = Colloid().plan(balanced(400, 250, rate))
    assert rows(down, SLOW) == [0]  # there is room below, so nothing comes back
    assert rows(down, FAST) == []
    assert down[0].reason == "rate 30.00/s, 250 ns there, 400 ns here"


def test_colloid_closes_in_on_the_balance() -> None:
    """The fast tier's latency grows with the pages in it, and equals the other one's at 70 of 200."""
    policy, counts = Colloid(), []
    view = view_of([FAST] * 150 + [SLOW] * 50, capacities=(200, 200), rate=1.0)
    for _ in range(12):
        latency = (np.count_nonzero(view.pages.tier == FAST) * 200e-9 / 70, 200e-9)
        tiers = tuple(replace(t, latency_s=latency[t.id]) if t.is_memory else t for t in view.tiers)
        view = replace(view, tiers=tiers)
        view = after(view, check_plan(view, policy.plan(view)))
        counts.append(np.count_nonzero(view.pages.tier == FAST))
    assert counts[:3] == [75, 38, 56]
    assert counts[-3:] == [counts[-1]] * 3
    assert counts[-1] == pytest.approx(70, rel=0.06)


def test_colloid_packs_the_hottest_where_latency_is_unknown() -> None:
    plan = Colloid().plan(view_of(FULL, rate=[1, 1, 5, 5, 9, 1.2, 0, 0]))
    assert (rows(plan, SLOW), rows(plan, FAST)) == ([1], [4])


def test_layer_prefetch_ranks_by_rate_and_does_not_bother_for_a_little_more() -> None:
    rate = [2.0, 8, 8, 8, 9, 8.5, 2.1, 0]
    plan = LayerPrefetch().plan(view_of(FULL, rate=rate, age_s=0.0, tensor_class=range(8)))
    assert (rows(plan, SLOW), rows(plan, FAST)) == ([0], [4])


def test_layer_prefetch_keeps_a_part_of_a_scan_that_is_faster_than_its_views() -> None:
    policy = LayerPrefetch()
    for second in range(20):
        view = view_of(FULL, rate=np.full(8, 5.0) + np.arange(8) / 10 * (-1) ** second, age_s=0.1, now_s=100.0 + second)
        assert policy.plan(view) == []


def scan(steps_s: int, capacity: int, policy: Any) -> float:
    """Part of the touches of a scan of 40 pages that the fast tier served; a page and a view a second."""
    count, hits = 40, 0
    seen, observed = np.full(count, NAN), np.zeros(count, np.uint32)
    tier = np.array([FAST] * (capacity - 1) + [SLOW] * (count - capacity + 1), np.int8)
    for second in range(steps_s):
        page = second % count
        hits += int(tier[page] == FAST) if second >= 2 * count else 0
        seen[page] = second + 1
        observed[page] += 1
        view = view_of(
            tier.tolist(), capacities=(capacity, 100), now_s=second + 1.0, quota=8, rate=1 / count,
            last_seen_s=seen, age_s=second + 1 - seen, observed=observed,
        )  # fmt: skip
        tier = after(view, check_plan(view, policy.plan(view))).pages.tier
    return hits / (steps_s - 2 * count)


def test_layer_prefetch_streams_a_slow_scan_that_lru_thrashes_on() -> None:
    assert scan(200, 10, Lru()) < 0.25
    assert scan(200, 10, LayerPrefetch()) > 0.95


def test_layer_prefetch_promotes_of_a_scan_what_is_due_soon_for_what_was_just_read() -> None:
    """12 pages, a page a second, page 3 was read last: 4 comes too late, 5 to 7 are next, 8 and on have time."""
    seen = np.array([100.0, 101, 102, 103, 92, 93, 94, 95, 96, 97, 98, 99])
    view = view_of([FAST] * 4 + [SLOW] * 8, now_s=103.5, last_seen_s=seen, age_s=103.5 - seen, rate=1 / 12)
    plan = LayerPrefetch().plan(view)
    assert sorted(rows(plan, FAST)) == [5, 6, 7]
    assert sorted(rows(plan, SLOW)) == [1, 2, 3]


def test_layer_prefetch_brings_back_a_model_that_is_opened_again_before_it_was_sampled() -> None:
    """Its rates of last time count: neither the 0 that it had while nobody read it, nor that it was slow in the end."""
    policy, model, second = LayerPrefetch(), [0] * 4 + [1] * 4, 100.0
    view = view_of(FULL, model=model, rate=[3.0] * 4 + [9.0] * 4, age_s=0.0, quota=0)
    slow = replace(view.pages, rate=np.float32([3] * 4 + [0.5] * 4))
    idle = replace(view.pages, rate=np.float32([3] * 4 + [0] * 4), leased=np.arange(8) < 4)
    for pages in [view.pages] * 4 + [slow] + [idle] * 30:
        policy.plan(replace(view, now_s=second, pages=pages))
        second += 1
    view = replace(view, now_s=second, quota_bytes=1 << 40)
    assert policy.plan(replace(view, pages=idle)) == []
    again = replace(idle, leased=np.ones(8, np.bool_), sampled_age_s=np.float32([0] * 4 + [5] * 4))
    opened = replace(view.models, last_open_s=np.array([0.0, second + 0.5]))
    plan = policy.plan(replace(view, now_s=second + 1, pages=again, models=opened))
    assert sorted(rows(plan, FAST)) == [4, 5, 6, 7]


def test_layer_prefetch_makes_room_of_idle_pages_only() -> None:
    view = view_of([FAST] * 80, capacities=(80, 100), rate=1.0, age_s=0.0, leased=[True] * 40 + [False] * 40, quota=5,
                   model=[0] * 40 + [1] * 40)  # fmt: skip
    assert sorted(rows(LayerPrefetch().plan(view), SLOW)) == [75, 76, 77, 78, 79]


@pytest.mark.parametrize("bandwidth", [(75.0, 25.0), (NAN, 25.0)])
def test_static_interleave_spreads_by_bandwidth_or_by_capacity(bandwidth: tuple[float, float]) -> None:
    tiers = tiers_of((300, 100), [], bandwidth_bytes_s=bandwidth)
    placed = StaticInterleave().place(sample_request(40, tiers))
    assert np.bincount(placed).tolist() == [30, 10]
    assert np.bincount(placed[:8]).tolist() == [6, 2]


def test_static_interleave_gives_the_others_what_a_full_tier_cannot_take() -> None:
    tiers = tiers_of((5, 50), [], low=2, bandwidth_bytes_s=(75.0, 25.0))
    assert np.bincount(StaticInterleave().place(sample_request(40, tiers))).tolist() == [3, 37]


@given(st.integers(0, 60), st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 9))
def test_static_interleave_places_every_page_where_there_is_room(
    pages: int, room: list[int], low: int, seed: int
) -> None:
    tiers = tiers_of(tuple(room), [], low=low, bandwidth_bytes_s=tuple(range(1, len(room) + 1)))
    placed = StaticInterleave().place(sample_request(pages, tiers, seed))
    assert len(placed) == pages
    counts = np.bincount(placed[placed >= 0], minlength=len(room))
    assert (counts <= room).all()
    assert counts.sum() == min(pages, sum(room))


def test_the_others_leave_placing_to_the_pool() -> None:
    assert [policy for policy in ALL if hasattr(policy, "place")] == [StaticInterleave]
