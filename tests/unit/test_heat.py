"""Heat against the plainest model that can be written: one Python object a page, in doubles, one window at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiermem.heat import Heat, HeatColumns, snapshot
from tiermem.observations import Bits, Counts, Rung

PAGES, HALF_LIFE_S = 5, 2.0
U32_MAX = 2**32 - 1


def bits(pages: Sequence[int], touched: Sequence[bool], end_s: float = 1.0, window_s: float = 0.1,
         rung: Rung = Rung.PRESENT) -> Bits:  # fmt: skip
    return Bits(rung, end_s - window_s, end_s, np.array(pages, np.int32), np.array(touched, np.bool_))


def counts(pages: Sequence[int], samples: Sequence[int], end_s: float = 1.0, window_s: float = 0.1,
           period: float = 1000.0) -> Counts:  # fmt: skip
    seen = np.array(pages, np.int32), np.array(samples, np.uint32)
    return Counts(Rung.PERF, end_s - window_s, end_s, *seen, period)


@dataclass
class NaivePage:
    sampled: int = 0
    observed: int = 0
    at_s: float = math.nan
    touched_s: float = 0.0
    exposed_s: float = 0.0
    windows: float = 0.0
    counted: float = 0.0
    watched_s: float = 0.0
    watched_at_s: float = math.nan
    watched_windows: int = 0
    last_s: float = math.nan
    first_s: float = math.nan
    rung: Rung = Rung.NONE

    def see(self, at_s: float) -> None:
        self.last_s = at_s if math.isnan(self.last_s) else max(self.last_s, at_s)
        self.first_s = at_s if math.isnan(self.first_s) else min(self.first_s, at_s)

    def add_bit(self, rung: Rung, window_s: float, end_s: float, touched: bool) -> None:
        if touched:
            self.see(end_s)
        if window_s <= 0:
            return
        now = end_s if math.isnan(self.at_s) else max(self.at_s, end_s)
        kept = 0.0 if math.isnan(self.at_s) else 0.5 ** ((now - self.at_s) / HALF_LIFE_S)
        self.at_s = now
        self.touched_s = self.touched_s * kept + touched * window_s
        self.exposed_s = self.exposed_s * kept + window_s
        self.windows = self.windows * kept + 1
        self.sampled += 1
        self.observed += touched
        self.rung = max(self.rung, rung)

    def add_count(self, window_s: float, end_s: float, samples: int, period: float) -> None:
        if samples:
            self.see(end_s)
        if window_s <= 0:
            return
        now = end_s if math.isnan(self.watched_at_s) else max(self.watched_at_s, end_s)
        kept = 0.0 if math.isnan(self.watched_at_s) else 0.5 ** ((now - self.watched_at_s) / HALF_LIFE_S)
        self.watched_at_s = now
        self.counted = self.counted * kept + samples * period
        self.watched_s = self.watched_s * kept + window_s
        self.watched_windows += 1
        self.sampled += 1
        self.observed += samples

    def rate(self) -> tuple[float, Rung]:
        if self.watched_windows and not self.watched_at_s < self.at_s - 8 * HALF_LIFE_S:
            return self.counted / self.watched_s, Rung.PERF
        if not self.exposed_s:
            return math.nan, self.rung
        part = min(self.touched_s / self.exposed_s, 1 - 0.5 / self.windows)
        return -math.log(1 - part) / (self.exposed_s / self.windows), self.rung

    def sampled_at_s(self) -> float:
        return float(np.fmax(self.at_s, self.watched_at_s))


@dataclass
class Naive:
    pages: list[NaivePage] = field(default_factory=lambda: [NaivePage() for _ in range(PAGES)])

    def add(self, seen: Bits | Counts | tuple[list[int], float]) -> None:
        if isinstance(seen, Bits):
            for page, touched in zip(seen.pages.tolist(), seen.touched.tolist(), strict=True):
                self.pages[page].add_bit(seen.rung, seen.end_s - seen.begin_s, seen.end_s, touched)
        elif isinstance(seen, Counts):
            samples = dict(zip(seen.pages.tolist(), seen.counts.tolist(), strict=True))
            for number, page in enumerate(self.pages):
                page.add_count(seen.end_s - seen.begin_s, seen.end_s, samples.get(number, 0), seen.period)
        else:
            for number in seen[0]:
                self.pages[number].see(seen[1])
                self.pages[number].rung = max(self.pages[number].rung, Rung.DECLARED)


def add(heat: Heat, seen: Bits | Counts | tuple[list[int], float]) -> None:
    if isinstance(seen, Bits):
        heat.add_bits(seen)
    elif isinstance(seen, Counts):
        heat.add_counts(seen)
    else:
        heat.add_declared(np.array(seen[0], np.int32), seen[1])


# Times in 64ths, so that the lengths of windows are exact; now and then a long silence, or a clock that went back.
times = st.one_of(st.integers(0, 64 * 20), st.integers(0, 64 * 600)).map(lambda n: n / 64)
lengths = st.sampled_from([-0.5, 0.0, 1 / 64, 0.125, 0.125, 0.125, 1.0])
some_pages = st.sets(st.integers(0, PAGES - 1)).map(sorted)


@st.composite
def observations(draw: st.DrawFn) -> Bits | Counts | tuple[list[int], float]:
    pages, end_s, window_s = draw(some_pages), draw(times), draw(lengths)
    kind = draw(st.sampled_from(["bits", "bits", "bits", "counts", "declared"]))
    if kind == "declared":
        return pages * 2, end_s
    if kind == "counts":
        drawn = draw(st.lists(st.integers(0, 1000), min_size=len(pages), max_size=len(pages)))
        return counts(pages, drawn, end_s, window_s, draw(st.sampled_from([1.0, 10007.0])))
    touched = draw(st.lists(st.booleans(), min_size=len(pages), max_size=len(pages)))
    return bits(pages, touched, end_s, window_s, draw(st.sampled_from([Rung.ACCESSED, Rung.PRESENT])))


@given(st.lists(observations(), max_size=25), times)
def test_it_says_what_the_naive_model_says(told: list[Bits | Counts | tuple[list[int], float]], now_s: float) -> None:
    heat, naive = Heat(PAGES, HALF_LIFE_S), Naive()
    for seen in told:
        add(heat, seen)
        naive.add(seen)
    columns = heat.columns(now_s)
    rates, rungs = zip(*(page.rate() for page in naive.pages), strict=True)
    # float32 keeps 2^-24 of a sum, and a count that decayed for more than about 100 half-lives is 0.
    np.testing.assert_allclose(columns.rate, rates, rtol=1e-4, atol=1e-20)
    assert columns.rung.tolist() == list(rungs)
    assert columns.sampled.tolist() == [page.sampled for page in naive.pages]
    assert columns.observed.tolist() == [page.observed for page in naive.pages]
    sampled_at = np.array([page.sampled_at_s() for page in naive.pages])
    last = np.array([page.last_s for page in naive.pages])
    assert columns.known.tolist() == (~np.isnan(sampled_at)).tolist()
    np.testing.assert_array_equal(columns.last_seen_s, last)
    np.testing.assert_array_equal(columns.age_s, np.maximum(now_s - last, 0).astype(np.float32))
    np.testing.assert_array_equal(columns.sampled_age_s, np.maximum(now_s - sampled_at, 0).astype(np.float32))
    assert not (columns.rate < 0).any()
    assert (np.isnan(columns.rate) == ~columns.known).all()


def test_unknown_is_not_cold() -> None:
    heat = Heat(4)
    heat.add_bits(bits([1, 2], [False, True]))
    heat.add_declared(np.array([3]), 2.0)
    columns = heat.columns(3.0)
    assert np.isnan(columns.rate).tolist() == [True, False, False, True]
    assert columns.known.tolist() == [False, True, True, False]
    assert columns.rate[1] == 0
    assert not np.signbit(columns.rate[1])
    assert columns.rung.tolist() == [Rung.NONE, Rung.PRESENT, Rung.PRESENT, Rung.DECLARED]
    np.testing.assert_array_equal(columns.age_s, [np.nan, np.nan, 2, 1])
    np.testing.assert_array_equal(columns.sampled_age_s, [np.nan, 2, 2, np.nan])


def test_counts_make_every_page_known() -> None:
    heat = Heat(3)
    heat.add_counts(counts([], []))
    assert heat.columns(1.0).rate.tolist() == [0, 0, 0]
    heat.add_counts(counts([2], [5], period=1000.0))
    columns = heat.columns(1.0)
    assert columns.rate.tolist() == pytest.approx([0, 0, 5000 / 0.2])
    assert columns.sampled.tolist() == [2, 2, 2]
    assert columns.observed.tolist() == [0, 0, 5]


def test_a_rate_follows_what_changed() -> None:
    """Touched in every window for long, then never: the decayed part halves with each half-life."""
    heat, window_s = Heat(1, half_life_s=1.0), 1 / 64
    for n in range(640):
        heat.add_bits(bits([0], [True], n * window_s, window_s))
    busy = float(heat.columns(10.0).rate[0])
    n_windows = 1 / (1 - 0.5**window_s)
    assert busy == pytest.approx(math.log(2 * n_windows) / window_s, rel=1e-3)
    for n in range(640, 640 + 64 * 3):
        heat.add_bits(bits([0], [False], n * window_s, window_s))
    assert heat.columns(13.0).rate[0] == pytest.approx(-math.log(1 - 1 / 8) / window_s, rel=1e-3)


def test_the_rate_of_a_poisson_process_is_found() -> None:
    random, window_s, rate = np.random.default_rng(3), 0.1, 6.0
    heat = Heat(400, half_life_s=10.0)
    pages = list(range(400))
    for n in range(500):
        heat.add_bits(bits(pages, (random.poisson(rate * window_s, 400) > 0).tolist(), n * window_s, window_s))
    assert float(heat.columns(50.0).rate.mean()) == pytest.approx(rate, rel=0.03)


def test_a_page_that_nobody_looks_at_keeps_its_rate() -> None:
    heat = Heat(2)
    for n in range(20):
        heat.add_bits(bits([0, 1], [n % 2 == 0, False], n * 0.1))
    before = heat.columns(2.0)
    for n in range(20, 10000):
        heat.add_bits(bits([1], [True], n * 0.1))
    after = heat.columns(1000.0)
    assert after.rate[0] == before.rate[0] > 0
    assert after.sampled_age_s[0] == pytest.approx(998.1)
    assert after.sampled_age_s[1] == pytest.approx(0.1, abs=1e-3)


def test_days_of_counts_neither_overflow_nor_vanish() -> None:
    heat = Heat(2)
    for n in range(5000):
        heat.add_counts(counts([0], [3], n * 60.0, 0.1, 1e6))
    assert heat.columns(3e5).rate.tolist() == pytest.approx([3e7, 0])
    heat.add_counts(counts([1], [3], 1e9, 0.1, 1e6))
    assert heat.columns(1e9).rate.tolist() == pytest.approx([0, 3e7])


def test_a_clock_that_went_back_is_learnt_from_at_once() -> None:
    heat = Heat(1)
    heat.add_bits(bits([0], [False], 1e6))
    for n in range(20):
        heat.add_bits(bits([0], [True], n * 0.1))
    columns = heat.columns(5.0)
    assert columns.rate[0] > 20
    assert columns.sampled_age_s[0] == 0


def test_the_greatest_numbers_give_no_infinity() -> None:
    heat = Heat(1)
    for n in range(200):
        heat.add_counts(counts([0], [U32_MAX], 0.5 * n, 0.1, 2.0**47))
        heat.add_bits(bits([0], [True], 0.5 * n, 1e-8 if n % 2 else 1e11))
    heat.add_bits(Bits(Rung.PRESENT, 0.0, 1e-300, np.array([0], np.int32), np.array([True])))
    columns = heat.columns(100.0)
    assert columns.rung[0] == Rung.PERF
    assert columns.sampled.tolist() == [400]
    assert columns.rate[0] == pytest.approx(U32_MAX * 2.0**47 / 0.1, rel=1e-5)
    heat.add_bits(bits([0], [True], 200.0))
    assert 0 < heat.columns(200.0).rate[0] < np.inf


def test_counts_that_ended_give_way_to_newer_bits() -> None:
    heat = Heat(2)
    heat.add_counts(counts([0], [1], 1.0))
    heat.add_bits(bits([0, 1], [True, False], 16.0))
    assert heat.columns(16.0).rung.tolist() == [Rung.PERF, Rung.PERF]
    heat.add_bits(bits([0], [True], 17.5))
    columns = heat.columns(17.5)
    assert columns.rung.tolist() == [Rung.PRESENT, Rung.PERF]
    assert 0 < columns.rate[0] < 100
    assert columns.rate[1] == 0


def test_numbers_that_are_full_stay_full() -> None:
    heat = Heat(2)
    heat.add_counts(counts([0, 1], [U32_MAX, U32_MAX - 1]))
    heat.add_counts(counts([0, 1], [5, 1]))
    heat.add_bits(bits([0, 1], [True, True]))
    assert heat.columns(1.0).observed.tolist() == [U32_MAX, U32_MAX]
    heat._sampled[:] = U32_MAX
    heat.add_bits(bits([0, 1], [True, True]))
    assert heat.columns(1.0).sampled.tolist() == [U32_MAX, U32_MAX]


NAN = math.nan


@pytest.mark.parametrize(
    "seen",
    [
        bits([-1], [True]), bits([3], [True]), bits([0, 0], [True, True]), bits([1, 0], [True, True]),
        bits([0, 1], [True]), bits([0], [True], NAN), bits([0], [True], 1.0, math.inf),
        bits([0], [True], 1e300),
        bits([0], [True], rung=Rung.DECLARED), bits([0], [True], rung=Rung.NONE),
        counts([-1], [1]), counts([3], [1]), counts([0], [1, 2]), counts([0], [1], NAN),
        counts([0], [1], period=0.0), counts([0], [1], period=NAN), counts([0], [1], period=-1.0),
        counts([0], [1], period=1e300),
        ([-1], 1.0), ([3], 1.0), ([0], NAN), ([0], 1e300),
    ],
)  # fmt: skip
def test_what_is_no_observation_is_refused_and_leaves_nothing(seen: Bits | Counts | tuple[list[int], float]) -> None:
    heat = Heat(3)
    with pytest.raises(ValueError, match=r"page|window|samples"):
        add(heat, seen)
    columns = heat.columns(1.0)
    assert not columns.known.any()
    assert not columns.rung.any()
    assert np.isnan(columns.last_seen_s).all()


@pytest.mark.parametrize(("pages", "half_life_s"), [(-1, 2.0), (1, 0.0), (1, -1.0), (1, NAN)])
def test_a_heat_that_cannot_be(pages: int, half_life_s: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        Heat(pages, half_life_s)


def test_nothing_is_fine() -> None:
    empty = Heat(0)
    for nothing in (bits([], []), counts([], []), ([], 1.0)):
        add(empty, nothing)
    assert len(empty.columns(1.0)) == len(snapshot((), 1.0)) == 0


def test_a_page_costs_no_more_than_48_bytes() -> None:
    assert Heat(1000).nbytes <= 48 * 1000


def same(one: HeatColumns, other: HeatColumns) -> None:
    for name in HeatColumns.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_a_snapshot_is_the_columns_of_each_model() -> None:
    """Small, large (several blocks), empty, with and without Counts, of different half-lives."""
    random, heats = np.random.default_rng(5), []
    for number, pages in enumerate((3, 40_000, 0, 70, 16_384, 5, 1, 20_000)):
        heat = Heat(pages, half_life_s=1.0 + number)
        for n in range(4):
            chosen = np.flatnonzero(random.random(pages) < 0.5).astype(np.int32)
            heat.add_bits(Bits(Rung.ACCESSED, n, n + 1.0 + 30 * (n == 3), chosen, random.random(len(chosen)) < 0.5))
            if number % 3 == 0:
                amounts = random.integers(0, 9, len(chosen), np.uint32)
                heat.add_counts(Counts(Rung.PERF, n, n + 1, chosen, amounts, 7.0))
        heats.append(heat)
    whole, first = snapshot(heats, 9.0), 0
    for heat in heats:
        same(whole.rows(slice(first, first + heat.pages)), heat.columns(9.0))
        first += heat.pages
    assert len(whole) == first


def test_columns_are_frozen_copies() -> None:
    heat = Heat(2)
    heat.add_bits(bits([0], [True]))
    columns = heat.columns(1.0)
    for name in HeatColumns.__slots__:
        with pytest.raises(ValueError, match="read-only"):
            getattr(columns, name)[0] = 0
    heat.add_bits(bits([0, 1], [True, True]))
    assert columns.sampled.tolist() == [1, 0]
