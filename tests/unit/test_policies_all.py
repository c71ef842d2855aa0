"""What all shipped policies have in common: plans that are possible, bounded, repeatable, and that come to an end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_policies import ALL, FAST, FULL, MOVING, NAN, SLOW, after, rows, tiers_of, view_of
from tiermem.policies.hold import Hold
from tiermem.policies.layer_prefetch import LayerPrefetch
from tiermem.policies.tpp import Tpp
from tiermem.policy import Plan, View, check_plan
from tiermem.policy.evidence import likely_rate
from tiermem.policy.sample import sample_view, subset
from tiermem.types import PAGE_BYTES

samples = st.builds(
    sample_view, st.sampled_from([0, 1, 2, 40, 700, 1500]), st.integers(0, 50), memory_tiers=st.integers(1, 3),
    full=st.sampled_from([0.5, 0.95, 1.0]), known=st.sampled_from([0.0, 0.5, 1.0]),
    needed_bytes=st.sampled_from([0, 1, 300 * PAGE_BYTES]),
    quota_bytes=st.sampled_from([0, 1, 30 * PAGE_BYTES, 1 << 40]),
)  # fmt: skip


def later(view: View, seed: int, seconds: float) -> View:
    """The same pages after more touches; `seconds` may be negative."""
    more = np.random.default_rng(seed).poisson(np.nan_to_num(view.pages.rate) * 2).astype(np.uint32)
    return replace(view, now_s=view.now_s + seconds, pages=replace(view.pages, observed=view.pages.observed + more))


def moved_pages(plan: Plan, disk: int) -> int:
    return sum(move.pages for move in plan if move.target != disk)


@pytest.mark.parametrize("policy", ALL)
@given(view=samples, seed=st.integers(0, 5), seconds=st.sampled_from([1.0, 0.0, -500.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_plans_are_possible_within_the_quota_and_repeatable(policy: Any, view: View, seed: int, seconds: float) -> None:
    """Over three views, of which the second lacks models and the third is earlier or much later."""
    kept = np.random.default_rng(seed).random(len(view.models)) < 0.7
    views = [view, subset(later(view, seed, 1.0), kept), later(later(view, seed, 1.0), seed, seconds)]
    one, two = policy(), policy()
    for each in views:
        plan = check_plan(each, one.plan(each))
        assert moved_pages(plan, each.tiers[-1].id) * PAGE_BYTES <= each.quota_bytes
        assert two.plan(each) == plan
        for tier in each.memory_tiers[:-1]:
            settled = next(t for t in after(each, plan).tiers if t.id == tier.id)
            assert settled.free_bytes >= min(tier.free_bytes, tier.low_bytes)


@pytest.mark.parametrize("policy", ALL)
@given(view=samples)
@settings(max_examples=15, deadline=None)
def test_nothing_known_at_all_is_no_failure(policy: Any, view: View) -> None:
    nothing = np.full(len(view.pages), NAN)
    pages = replace(
        view.pages, rate=nothing.astype(np.float32), age_s=nothing.astype(np.float32), last_seen_s=nothing,
        sampled_age_s=nothing.astype(np.float32), known=np.zeros(len(nothing), np.bool_), last_used_s=nothing,
        observed=np.zeros(len(nothing), np.uint32),
    )  # fmt: skip
    models = replace(view.models, last_open_s=np.full(len(view.models), NAN), rate=np.full(len(view.models), NAN))
    made = policy()
    for second in range(2):
        blind = replace(view, pages=pages, models=models, now_s=view.now_s + second)
        check_plan(blind, made.plan(blind))


@pytest.mark.parametrize("policy", MOVING)
@pytest.mark.parametrize("seed", range(4))
def test_once_settled_a_policy_asks_for_nothing_more(policy: Any, seed: int) -> None:
    """Heat stands still, so after a few rounds everything is in its place."""
    view = sample_view(1500, seed, full=0.95, known=1.0, quota_bytes=1 << 40)
    view = replace(view, tiers=tuple(replace(tier, latency_s=NAN) for tier in view.tiers))
    made, plans = policy(), []
    made.plan(replace(view, pages=replace(view.pages, observed=np.zeros(len(view.pages), np.uint32))))
    for number in range(8):
        # By rate and age heat stands still as it is, by counts while nothing new is seen; a pass sees all or nothing.
        seen = view.pages.observed + np.uint32(number if policy is Tpp else 0) * (view.pages.age_s < 1)
        plans.append(made.plan(replace(view, pages=replace(view.pages, observed=seen.astype(np.uint32)))))
        view = replace(after(view, plans[-1]), now_s=view.now_s)
    assert any(plans)
    assert plans[-1] == []


@pytest.mark.parametrize("policy", [policy for policy in ALL if policy is not Hold])
def test_one_tier_is_only_relieved_under_pressure(policy: Any) -> None:
    quiet = view_of([FAST] * 9, capacities=(9,), low=2, high=3, leased=[True] * 4 + [False] * 5, last_used_s=range(9))
    assert policy().plan(quiet) == []
    assert rows(policy().plan(replace(quiet, needed_bytes=2 * PAGE_BYTES)), quiet.tiers[-1].id) == [4, 5]


@pytest.mark.parametrize("policy", MOVING)
@pytest.mark.parametrize(("capacities", "low"), [((40, 5), 0), ((41, 4), 1)])
def test_full_tiers_still_exchange_pages_through_the_one_page_that_is_free(
    policy: Any, capacities: tuple[int, int], low: int
) -> None:
    """It is free in the slow tier, or is the fast one's reserve."""
    heat = {"rate": [0.0] * 40 + [9.0] * 4, "age_s": [90.0] * 40 + [0.1] * 4, "tensor_class": [1] * 40 + [2] * 4}
    view = view_of([FAST] * 40 + [SLOW] * 4, capacities=capacities, low=low, high=low, **heat)
    made, observed = policy(), view.pages.observed
    for second in range(4):
        observed = observed + np.array([0] * 40 + [15] * 4, np.uint32)
        seen = replace(view, now_s=view.now_s + second, pages=replace(view.pages, observed=observed))
        view = replace(after(seen, check_plan(seen, made.plan(seen))), now_s=view.now_s)
    assert view.pages.tier.tolist() == [FAST] * 36 + [SLOW] * 4 + [FAST] * 4


def test_between_the_watermarks_only_what_is_worth_more_than_the_least_page_comes_in() -> None:
    """Else the pages that made the room would come back into it."""
    view = view_of(FULL, capacities=(6, 100), low=1, high=2, rate=[3, 3, 3, 3, 2, 1, 1, 1], tensor_class=range(8))
    assert LayerPrefetch().plan(view) == []
    hotter = replace(view, pages=replace(view.pages, rate=np.float32([3, 3, 3, 3, 4, 4, 1, 1])))
    plan = LayerPrefetch().plan(hotter)
    assert (rows(plan, FAST), rows(plan, SLOW)) == ([4, 5], [3])
    roomy = replace(view, tiers=tiers_of((8, 100), FULL, 1, 2))
    assert rows(LayerPrefetch().plan(roomy), FAST) == [4, 5]


def test_a_likely_rate_is_that_of_the_pages_nearby_and_0_where_nobody_reads() -> None:
    view = view_of(
        [SLOW] * 6, model=[0, 0, 0, 1, 1, 2], rate=[4, 2, NAN, 9, NAN, NAN], leased=[True] * 3 + [False] * 2 + [True]
    )
    assert likely_rate(view).tolist() == [4, 2, 3, 9, 0, 5]
