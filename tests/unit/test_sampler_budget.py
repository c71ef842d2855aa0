"""The budget of sampling, against simulated clients: what it promises is kept, and no client makes it swing."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tiermem.sampler.budget import _UNSEEN, LONGEST_PAUSE_S, Budget, Spent


def run(
    budget: Budget, total: int, epochs: int, *, page_s: float, agent_s: float = 1e-4, look_s: float = 2e-7
) -> tuple[list[int], list[float]]:
    """Epochs of a client that touches all of its pages, and whose turns take `look_s` a page: pages of each epoch, and
    its cost over CPU time."""
    pages, costs = [budget.pages(total, None)], list[float]()
    for _ in range(epochs):
        wall_s = budget.pause_s
        client_s = wall_s
        spent = Spent(
            agent_s + pages[-1] * look_s, pages[-1] * look_s, pages[-1] * page_s, pages[-1], 1, client_s, wall_s
        )
        costs.append((spent.agent_s + spent.fault_s) / client_s * _UNSEEN)
        pages.append(budget.pages(total, spent))
    return pages, costs


@pytest.mark.parametrize("fraction", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("page_s", [1.3e-6, 5e-6, 1e-4])
def test_cost_settles_at_the_budget_and_does_not_swing(fraction: float, page_s: float) -> None:
    pages, costs = run(Budget(fraction), 71680, 60, page_s=page_s)
    settled = costs[-20:]
    assert max(settled) < fraction * 1.1
    if pages[-1] < 71680:
        assert min(settled) > fraction * 0.9


def test_a_cheap_client_is_sampled_whole() -> None:
    pages, costs = run(Budget(), 64, 20, page_s=1.3e-6)
    assert pages[-1] == 64
    assert costs[-1] < 0.01


def test_too_dear_at_the_least_part_makes_longer_epochs_and_cheaper_again_shorter_ones() -> None:
    budget = Budget(0.01, 0.1)
    pages, costs = run(budget, 10_000, 60, page_s=1e-4)
    assert pages[-1] == 157  # a 64th, rounded up
    assert 0.1 < budget.pause_s < LONGEST_PAUSE_S
    assert costs[-1] == pytest.approx(0.01, rel=0.1)
    pages, _ = run(budget, 10_000, 60, page_s=1e-7)
    assert budget.pause_s == 0.1
    assert pages[-1] > 157


def test_the_first_epoch_is_small_and_growth_is_steady() -> None:
    pages, _ = run(Budget(), 1 << 16, 12, page_s=1e-8, look_s=0.0)
    assert pages[0] == 1024
    assert all(later <= 4 * earlier for earlier, later in pairwise(pages))
    assert pages[-1] == 1 << 16


@pytest.mark.parametrize("total", [0, 1, 5])
def test_few_pages_are_all_sampled(total: int) -> None:
    pages, _ = run(Budget(), total, 5, page_s=1.0, agent_s=1.0)
    assert set(pages) == {total}


def test_an_idle_client_is_asked_ever_less_often_and_a_busy_one_at_once_as_before() -> None:
    budget = Budget(0.01, 0.1)
    pauses = []
    for _ in range(6):
        assert budget.is_idle(0.0005, budget.pause_s)
        pauses.append(budget.pause_s)
    assert pauses == [0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    assert not budget.is_idle(0.5, 1.0)
    assert budget.pause_s == 0.1


def test_idleness_does_not_shorten_epochs_that_cost_made_longer() -> None:
    budget = Budget(0.01, 5.0)
    assert budget.is_idle(0.0, 5.0)
    assert budget.pause_s == 5.0


def test_no_cost_at_all_divides_by_nothing() -> None:
    budget = Budget()
    budget.pages(1000, None)
    assert budget.pages(1000, Spent(0.0, 0.0, 0.0, 16, 1, 0.0, 0.1)) >= 16
