"""The policy interface: what a view tells, which plans and places are possible, and state that follows its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.errors import PolicyError
from tiermem.policy import (
    PAGE_DTYPES,
    Models,
    Move,
    Pages,
    PageState,
    Request,
    TierView,
    View,
    check_plan,
    evictions,
    fill_fastest,
    moves,
)
from tiermem.policy.placing import NOWHERE, check_place
from tiermem.policy.sample import sample_request, sample_view, subset
from tiermem.types import LOADING, PAGE_BYTES

HBM, DRAM, CXL, DISK = 0, 1, 2, 3

Segment = tuple[int, int, int, float, bool, bool]
"""(model, pages, tier, last used, leased, pinned); segments of a model are numbered in order"""


def view_of(segments: Sequence[Segment], needed_bytes: int = 0, free: tuple[int, int, int] = (4, 4, 4)) -> View:
    """`free`: pages that HBM, DRAM and CXL memory have free."""
    rows: list[tuple[Any, ...]] = []
    numbers: dict[int, int] = {}
    for model, pages, tier, last_used_s, leased, pinned in segments:
        numbers[model] = numbers.get(model, -1) + 1
        rows += [(model, numbers[model], tier, last_used_s, leased, pinned)] * pages
    names = ("model", "segment", "tier", "last_used_s", "leased", "pinned")
    given = dict(zip(names, zip(*rows, strict=True) if rows else [()] * 6, strict=True))
    columns: dict[str, Any] = {name: np.zeros(len(rows), dtype) for name, dtype in PAGE_DTYPES.items()}
    columns |= {name: np.array(values, PAGE_DTYPES[name]) for name, values in given.items()}
    columns["id"] = np.arange(len(rows))
    used = [sum(pages for _, pages, tier, *_ in segments if tier == number) for number in range(3)]
    kinds = ("hbm", "dram", "cxl")
    tiers = [TierView(number, kinds[number], kinds[number], (used[number] + free[number]) * PAGE_BYTES,
                      used[number] * PAGE_BYTES) for number in range(3)]  # fmt: skip
    count = max(numbers, default=-1) + 1
    models = Models(tuple(f"m{n}" for n in range(count)), *(np.zeros(count, t) for t in "qqdd"))
    return View(100.0, (*tiers, TierView(DISK, "disk", "disk", None, 0)), models, Pages(**columns), needed_bytes)


def plain(tier: int, pages: int = 1, last_used_s: float = 1.0, model: int = 0) -> Segment:
    return model, pages, tier, last_used_s, False, False


def test_memory_tiers_are_those_between_which_pages_move() -> None:
    assert [tier.name for tier in view_of([]).memory_tiers] == ["dram", "cxl"]


def test_what_moves_is_in_memory_and_not_pinned() -> None:
    view = view_of([plain(HBM), plain(DRAM), plain(CXL), plain(DISK), plain(LOADING), (0, 1, DRAM, 1.0, True, False),
                    (0, 1, DRAM, 1.0, False, True)])  # fmt: skip
    assert np.flatnonzero(view.movable).tolist() == [1, 2, 5]


def test_whole_segments_in_memory_are_evictable() -> None:
    view = view_of([
        (0, 2, DRAM, 1.0, False, False),
        (0, 3, DISK, 2.0, False, False),
        (1, 1, DRAM, 3.0, True, False),
        (2, 1, CXL, 4.0, False, True),
        (3, 1, LOADING, 5.0, False, False),
        (4, 4, CXL, 6.0, False, False),
    ])  # fmt: skip
    assert [(run.first, run.pages, run.last_used_s) for run in view.evictable()] == [(0, 2, 1.0), (8, 4, 6.0)]
    assert [run.nbytes for run in view.evictable()] == [2 * PAGE_BYTES, 4 * PAGE_BYTES]
    view.pages.tier[9] = DISK
    assert [run.first for run in replace(view).evictable()] == [0]
    assert list(view_of([]).evictable()) == []


def test_neighbours_of_equal_segment_number_are_two_models() -> None:
    assert [run.first for run in view_of([plain(DRAM), plain(DRAM, model=1)]).evictable()] == [0, 1]


def test_moves_join_neighbours_of_one_segment_and_tier_in_the_order_given() -> None:
    view = view_of([plain(DRAM, 3), plain(DRAM, 2), plain(CXL, 2), plain(CXL, 1, model=1)])
    plan = moves(view, np.array([5, 6, 7, 0, 1, 3, 2]), DISK, "why")
    assert [(move.first, move.pages, move.source) for move in plan] == [
        (5, 2, CXL), (7, 1, CXL), (0, 2, DRAM), (3, 1, DRAM), (2, 1, DRAM),
    ]  # fmt: skip
    assert {(move.target, move.reason, move.kind) for move in plan} == {(DISK, "why", "move")}
    assert moves(view, np.array([], np.int64), DISK, "why") == []


def test_evictions_free_what_is_needed_longest_unused_and_last_layer_first() -> None:
    segments = [plain(DRAM, 2, 30.0), plain(CXL, 2, 10.0), plain(DRAM, 2, 20.0), plain(DRAM, 2, 20.0)]
    for pages, firsts in ((0, []), (1, [2]), (2, [2]), (3, [2, 6]), (5, [2, 6, 4]), (99, [2, 6, 4, 0])):
        plan = evictions(view_of(segments, pages * PAGE_BYTES))
        assert [move.first for move in plan] == firsts
    assert plan[0] == Move(2, 2, CXL, DISK, "unused for 90.0 s")
    assert check_plan(view_of(segments), plan) == plan


def test_evictions_by_a_coldness_of_ones_own() -> None:
    view = view_of([plain(DRAM), plain(DRAM), plain(DRAM)], PAGE_BYTES)
    assert [move.first for move in evictions(view, lambda run: (-run.first,))] == [0]


def test_a_plan_is_checked_as_if_it_were_done_in_order() -> None:
    view = view_of([plain(DRAM, 2), plain(CXL, 2)], free=(1, 0, 1))
    room, then = Move(0, 1, DRAM, CXL, ""), Move(2, 1, CXL, DRAM, "")
    assert check_plan(view, [room, then]) == [room, then]
    with pytest.raises(PolicyError, match=r"move 0 of the plan, .*tier dram has room for 0 pages by then"):
        check_plan(view, [then, room])
    with pytest.raises(PolicyError, match=r"move 2 .*not all of its pages are in tier 1"):
        check_plan(view, [room, then, room])
    with pytest.raises(PolicyError, match=r"move 1 .*tier cxl has room for 0 pages by then"):
        check_plan(view, [room, Move(1, 1, DRAM, CXL, "")])


def test_copies_are_counted_where_they_are() -> None:
    view = view_of([plain(DRAM, 2)], free=(1, 0, 0))
    copy, drop = Move(0, 1, DRAM, HBM, "", "copy"), Move(0, 1, HBM, DRAM, "", "drop")
    assert check_plan(view, [copy, drop, copy]) == [copy, drop, copy]
    for plan in (
        [copy, copy],
        [drop],
        [replace(copy, pages=2)],
        [replace(copy, target=CXL)],
        [replace(copy, source=CXL)],
    ):
        with pytest.raises(PolicyError):
            check_plan(view, plan)


def simulate(view: View, plan: list[Move]) -> bool:
    """Whether a plan can be done, page by page, as the words of the interface say."""
    pages = view.pages
    tier, copies = pages.tier.tolist(), [{t for t in range(8) if code >> t & 1} for code in pages.replicas.tolist()]
    free = {t.id: t.free_bytes // PAGE_BYTES for t in view.tiers}
    memory, disk = {DRAM, CXL}, DISK
    for move in plan:
        rows = range(move.first, move.first + move.pages)
        if not rows or min(rows) < 0 or max(rows) >= len(tier) or not {move.source, move.target} <= set(free):
            return False
        if any(pages.pinned[row] for row in rows):
            return False
        evicted = move.kind == "move" and move.target == disk
        here = pages.model[move.first], pages.segment[move.first]
        whole = [row for row in range(len(tier)) if (pages.model[row], pages.segment[row]) == here]
        if evicted and (whole != list(rows) or any(pages.leased[row] for row in rows)):
            return False
        room = dict(free)
        for row in rows:
            if move.kind == "move":
                if tier[row] not in memory or not (evicted or (tier[row] == move.source and move.target in memory)):
                    return False
                if move.source == move.target:
                    return False
                free[tier[row]] += 1
                free[move.target] -= 1
                room[move.target] -= 1
                tier[row] = move.target
            elif move.kind == "copy":
                if tier[row] != move.source or move.target in copies[row] or move.target != HBM:
                    return False
                free[move.target] -= 1
                room[move.target] -= 1
                copies[row].add(move.target)
            else:
                if move.source not in copies[row]:
                    return False
                free[move.source] += 1
                copies[row].remove(move.source)
        if min(room.values()) < 0:
            return False
    return True


some_segments = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from([DRAM, DRAM, CXL, DISK, LOADING]),
              st.sampled_from([1.0, 2.0, 3.0]), st.booleans(), st.integers(0, 5).map(lambda n: n == 0)),
    min_size=1, max_size=6,
).map(lambda found: sorted(found, key=lambda segment: segment[0]))  # fmt: skip
some_moves = st.builds(
    Move, st.integers(-1, 8), st.integers(0, 3), st.sampled_from([DRAM, CXL, HBM, DISK, 4, -1]),
    st.sampled_from([DRAM, CXL, DISK, HBM, 4, LOADING]), st.just(""), st.sampled_from(["move", "move", "copy", "drop"]),
)  # fmt: skip


def accepted(view: View, plan: list[Move]) -> bool:
    try:
        check_plan(view, plan)
    except PolicyError:
        return False
    return True


@given(some_segments, st.lists(some_moves, max_size=4), st.tuples(*[st.integers(0, 2)] * 3))
def test_check_plan_accepts_nothing_that_cannot_be_done(
    segments: list[Segment], plan: list[Move], free: tuple[int, int, int]
) -> None:
    view = view_of(segments, free=free)
    assert accepted(view, plan) <= simulate(view, plan)


@given(some_segments, st.data(), st.tuples(*[st.integers(0, 2)] * 3))
def test_check_plan_accepts_all_that_can_be_done(
    segments: list[Segment], data: st.DataObject, free: tuple[int, int, int]
) -> None:
    """Moves whose source is right, so that most of them are possible."""
    view = view_of(segments, free=free)
    plan = []
    for _ in range(3):
        first = data.draw(st.integers(0, len(view.pages) - 1))
        kind = data.draw(st.sampled_from(["move", "copy"]))
        plan.append(Move(first, data.draw(st.integers(1, 3)), int(view.pages.tier[first]),
                         data.draw(st.sampled_from([HBM, DRAM, CXL, DISK])), "", kind))  # fmt: skip
    assert accepted(view, plan) == simulate(view, plan)


def test_state_follows_its_pages() -> None:
    view = sample_view(2000, 1)
    half = np.arange(len(view.models)) % 2 == 0
    state = PageState(np.float32, fill=7)
    state.of(view.pages)[:] = view.pages.id
    assert (state.of(view.pages) == view.pages.id).all()
    left = subset(view, half)
    assert (state.of(left.pages) == left.pages.id).all()
    assert state.of(left.pages) is state.of(left.pages)
    assert state.of(left.pages).dtype == np.float32
    back, known = state.of(view.pages), half[view.pages.model]
    assert (back[known] == view.pages.id[known]).all()
    assert (back[~known] == 7).all()
    assert len(state.of(sample_view(0).pages)) == 0
    assert (state.of(view.pages) == 7).all()


def request_of(free: Sequence[int], low: Sequence[int] = (0, 0), pages: int = 6) -> Request:
    tiers = [TierView(number, kind, kind, room * PAGE_BYTES, 0, kept * PAGE_BYTES)
             for number, (kind, room, kept) in enumerate(zip(("dram", "cxl"), free, low, strict=True))]  # fmt: skip
    return sample_request(pages, (*tiers, TierView(2, "disk", "disk", None, 0)))


@pytest.mark.parametrize(
    ("free", "low", "placed"),
    [
        ((9, 9), (0, 0), [0] * 6),
        ((4, 9), (1, 0), [0, 0, 0, 1, 1, 1]),
        ((4, 3), (1, 1), [0, 0, 0, 1, 1, 1]),
        ((4, 3), (2, 2), [0, 0, 1, 1, 1, 0]),
        ((2, 2), (0, 0), [0, 0, 1, 1, -1, -1]),
        ((0, 0), (5, 5), [-1] * 6),
    ],
)
def test_the_fastest_tier_is_filled_first(free: Sequence[int], low: Sequence[int], placed: list[int]) -> None:
    request = request_of(free, low)
    answer = fill_fastest(request)
    assert answer.tolist() == placed
    assert answer.dtype == np.int8
    assert check_place(request, answer).tolist() == placed


@pytest.mark.parametrize("placed", [[0] * 6, (0, 0, 1, 1, 1, 1), np.array([1, 0, 1, 0, 1, 1], np.uint64)])
def test_places_that_have_room_are_taken(placed: Any) -> None:
    answer = check_place(request_of((6, 4)), placed)
    assert answer.dtype == np.int8
    assert answer.tolist() == list(placed)


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        (np.zeros(6, np.bool_), "bool; tier ids"),
        ([0] * 5 + [1.0], "float64; tier ids"),
        ([1] * 6, "puts 6 pages into tier 1, which has room for 4"),
        ([0] * 5 + [NOWHERE], "tier 0 has room for 1 more"),
        ([2] * 6, r"names tier 2; the memory tiers are \[0, 1\]"),
        ("000000", "not str"),
    ],
)
def test_places_that_have_no_room_are_refused(placed: Any, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        check_place(request_of((6, 4)), placed)


def as_bytes(view: View) -> list[bytes]:
    columns: list[npt.NDArray[Any]] = [getattr(view.pages, field.name) for field in fields(view.pages)]
    return [column.tobytes() for column in columns]


@pytest.mark.parametrize("memory_tiers", [1, 2, 3])
def test_a_sample_is_a_view_as_a_pool_gives_it(memory_tiers: int) -> None:
    view = sample_view(5000, 3, memory_tiers=memory_tiers)
    pages = view.pages
    for name, dtype in PAGE_DTYPES.items():
        column = getattr(pages, name)
        assert column.dtype == dtype, name
        assert len(column) == 5000, name
        assert not column.flags.writeable, name
    assert (np.diff(pages.id) > 0).all()
    order = np.lexsort((pages.id, pages.segment, pages.model))
    assert (order == np.arange(5000)).all()
    assert set(pages.model) == set(range(len(view.models.name)))
    assert [tier.used_bytes // PAGE_BYTES for tier in view.tiers] == [
        (pages.tier == tier.id).sum() for tier in view.tiers
    ]
    for tier in view.memory_tiers:
        assert tier.capacity_bytes
        assert 0.85 < tier.used_bytes / tier.capacity_bytes < 0.95
    assert len(view.memory_tiers) == memory_tiers
    assert (np.isnan(pages.rate) == ~pages.known).all()
    assert 0.85 < pages.known.mean() < 0.95
    assert len(list(view.evictable())) > 10
    assert as_bytes(view) == as_bytes(sample_view(5000, 3, memory_tiers=memory_tiers))
    assert as_bytes(view) != as_bytes(sample_view(5000, 4, memory_tiers=memory_tiers))
