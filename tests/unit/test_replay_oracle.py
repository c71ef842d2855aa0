"""The oracle: against every possible choice on small traces, and against demand policies on larger ones."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import trace
from tiermem.replay.oracle import oracle_hits
from tiermem.replay.trace import Trace


def hits(of: Trace, places: int) -> int:
    return int(oracle_hits(of, places).sum())


def singles(pages: list[int], of: int = 6) -> Trace:
    return trace([(float(i), [page]) for i, page in enumerate(pages)], pages=of, end_s=len(pages) + 1.0)


def test_by_hand() -> None:
    # One place, a b a b: kept from the start or taken in when touched, either a or b is hit twice.
    assert hits(singles([0, 1, 0, 1]), 1) == 2
    assert hits(singles([0, 1, 0, 1]), 2) == 4
    assert hits(singles([0, 1, 0, 1]), 0) == 0


def test_a_cyclic_scan_hits_as_much_as_fits() -> None:
    made = trace([(i + j / 8, [2 * j, 2 * j + 1]) for i in range(20) for j in range(4)], pages=8, end_s=21.0)
    assert hits(made, 4) == made.touches // 2
    assert hits(made, 8) == made.touches


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=9), st.integers(0, 4))
def test_no_sequence_of_choices_is_better(pages: list[int], places: int) -> None:
    sequence = tuple(pages)

    @lru_cache(None)
    def best(at: int, held: frozenset[int]) -> int:
        if at == len(sequence):
            return 0
        page = sequence[at]
        after = {held} | {(held - {out}) | {page} for out in held} | ({held | {page}} if len(held) < places else set())
        return (page in held) + max(best(at + 1, choice) for choice in after)

    every = [frozenset(start) for size in range(places + 1) for start in combinations(range(5), size)]
    assert hits(singles(pages), places) == max(best(0, start) for start in every)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=6, unique=True), max_size=60), st.integers(1, 20))
def test_no_policy_that_fetches_on_demand_is_better(visits: list[list[int]], places: int) -> None:
    made = trace([(float(i), pages) for i, pages in enumerate(visits)], pages=20, end_s=99.0)
    held: list[int] = list(range(places))
    served = 0
    for pages in visits:
        served += len(set(pages) & set(held))
        for page in pages:
            held = [page, *(other for other in held if other != page)][:places]
    assert hits(made, places) >= served


def test_more_room_is_never_worse() -> None:
    random = np.random.default_rng(0)
    made = trace([(i / 10, random.choice(40, 5, replace=False).tolist()) for i in range(500)], pages=40, end_s=60.0)
    by_places = [hits(made, places) for places in range(0, 41, 5)]
    assert by_places == sorted(by_places)
    assert by_places[-1] == made.touches


def test_hits_are_told_by_visit() -> None:
    assert oracle_hits(singles([0, 1, 1, 0]), 1).tolist() in ([1, 0, 1, 0], [0, 1, 1, 0])


@pytest.mark.parametrize("places", [0, 3])
def test_a_trace_without_touches(places: int) -> None:
    assert hits(trace([]), places) == 0
