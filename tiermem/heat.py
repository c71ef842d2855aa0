"""Heat: what samplers observed of a model's pages, as columns. Never samples, never decides, never asks for the time.

Unknown is not cold: a page that was sampled and never touched has rate 0, one that was never sampled has rate NaN.

One-bit windows (Bits) and samples of a whole model (Counts) are kept apart, since a count of windows and a count of
accesses are no one sum. Of both, the mean over time decays exponentially:

    Bits     touched and sampled seconds of a page decay when it is sampled again, so that its rate stays as it was
             while nobody looks; `sampled_age_s` tells how old that knowledge is.
    Counts   all pages are watched alike, so the watched seconds are one number of the model; new touches weigh
             2^(t / half life) more instead of all old ones less, as in forward decay (Cormode et al., ICDE 2009).

No lock inside: the pool's lock guards it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.observations import Bits, Counts, Rung

HALF_LIFE_S = 2.0

_PATIENCE = 8.0
"""Half-lives for which Counts that ended stay the better source of a rate than newer Bits."""

_RESCALE = 32.0
"""Half-lives after which the weights of Counts start from 1 again: float32 holds 2^127."""

_BLOCK = 1 << 14
"""Pages for which figures are computed at once, so that what lies between stays in the processor's cache."""

_TIME_LIMIT_S, _SHORTEST_S, _PERIOD_LIMIT = 1e12, 1e-9, 2.0**48
"""Beyond these float32 would overflow, or lose a window; no clock and no counter goes there."""

_U32_MAX = np.iinfo(np.uint32).max


@dataclass(frozen=True, slots=True)
class HeatColumns:
    """One row a page; read-only arrays of equal length.

    `sampled`: windows in which the page was sampled; `observed`: windows in which it was touched, and hardware samples
    (both stop at 2^32 - 1). `rate`: touches per second, NaN if unknown. `age_s`: since the page was last seen touched
    or asked for, `sampled_age_s`: since it was last sampled; NaN if never, and never negative. `rung`: a Rung, the one
    that the rate is from, else DECLARED or NONE. `known`: sampled by a rung that can say "not touched".
    """

    sampled: npt.NDArray[np.uint32]
    observed: npt.NDArray[np.uint32]
    rate: npt.NDArray[np.float32]
    age_s: npt.NDArray[np.float32]
    sampled_age_s: npt.NDArray[np.float32]
    last_seen_s: npt.NDArray[np.float64]
    rung: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.rate)

    def rows(self, rows: slice) -> HeatColumns:
        """These rows, as views: of one model, say."""
        return HeatColumns(*(getattr(self, name)[rows] for name in _COLUMNS))


_COLUMNS: dict[str, type[Any]] = {
    "sampled": np.uint32, "observed": np.uint32, "rate": np.float32, "age_s": np.float32, "sampled_age_s": np.float32,
    "last_seen_s": np.float64, "rung": np.uint8, "known": np.bool_,
}  # fmt: skip


class Heat:
    """Heat of one model of `pages` pages, 41 bytes each. See the module for what decays how.

    A window counts as of its end. One that ends before what is already known (late, or the clock went back) counts as
    if it ended then, so that weights never grow beyond 1. A window of no or negative length says that its touched
    pages were seen, and nothing of rates. Raises ValueError for anything that is no observation of this model; then
    nothing of it was taken in.
    """

    __slots__ = (
        "_base_s", "_counted", "_counts_rung", "_exposed_s", "_last_s", "_observed", "_rung",
        "_sampled", "_sampled_at_s", "_touched_s", "_watched_at_s", "_watched_s", "_watched_windows", "_windows",
        "half_life_s", "pages",
    )  # fmt: skip

    def __init__(self, pages: int, half_life_s: float = HALF_LIFE_S) -> None:
        if pages < 0 or not (math.isfinite(half_life_s) and half_life_s > 0):
            raise ValueError(f"heat of {pages} pages with a half-life of {half_life_s} s: neither may be negative or 0")
        self.pages = pages
        self.half_life_s = half_life_s
        self._sampled = np.zeros(pages, np.uint32)
        self._observed = np.zeros(pages, np.uint32)
        self._touched_s = np.zeros(pages, np.float32)
        self._exposed_s = np.zeros(pages, np.float32)
        self._windows = np.zeros(pages, np.float32)
        self._counted = np.zeros(pages, np.float32)
        self._sampled_at_s = np.full(pages, np.nan)
        self._last_s = np.full(pages, np.nan)
        self._rung = np.zeros(pages, np.uint8)
        self._base_s = math.nan  # where Counts weigh 1
        self._watched_s = 0.0
        self._watched_at_s = math.nan
        self._watched_windows = 0
        self._counts_rung = Rung.NONE

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        arrays = (getattr(self, name) for name in self.__slots__)
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    def add_bits(self, bits: Bits) -> None:
        """Takes in one window of one mapping."""
        rows = self._window(bits, bits.touched)
        self._see(bits.pages[bits.touched], bits.end_s)
        window_s = bits.end_s - bits.begin_s
        if window_s < _SHORTEST_S or not len(bits.pages):
            return
        before = self._sampled_at_s[rows]
        now = np.fmax(before, bits.end_s)
        kept = np.exp2((before - now) * (1 / self.half_life_s)).astype(np.float32)
        kept[np.isnan(before)] = 0
        for column, added in (
            (self._touched_s, bits.touched * np.float32(window_s)),
            (self._exposed_s, np.float32(window_s)),
            (self._windows, np.float32(1)),
        ):
            column[rows] = column[rows] * kept + added
        self._sampled_at_s[rows] = now
        self._sampled[rows] = _saturated(self._sampled[rows], 1)
        self._observed[rows] = _saturated(self._observed[rows], bits.touched)
        self._rung[rows] = np.maximum(self._rung[rows], np.uint8(bits.rung))

    def add_counts(self, counts: Counts) -> None:
        """Takes in one window in which every page of the model was watched."""
        if not 0 < counts.period < _PERIOD_LIMIT:
            raise ValueError(f"samples with a period of {counts.period}: it must be positive and less than 2^48")
        rows = self._window(counts, counts.counts)
        self._see(counts.pages[counts.counts > 0], counts.end_s)
        window_s = counts.end_s - counts.begin_s
        if window_s < _SHORTEST_S:
            return
        weight = self._weight(counts.end_s)
        self._counted[rows] += (counts.counts * (counts.period * weight)).astype(np.float32)
        self._watched_s += window_s * weight
        self._watched_windows += 1
        self._counts_rung = max(self._counts_rung, counts.rung)
        self._observed[rows] = _saturated(self._observed[rows], counts.counts)

    def add_declared(self, pages: npt.NDArray[np.integer], now_s: float) -> None:
        """Pages were asked for through the API, in any order: they were seen. It says nothing of rates."""
        if not abs(now_s) < _TIME_LIMIT_S:
            raise ValueError(f"pages asked for at {now_s} s: that is no time")
        if len(pages):
            self._in_range(int(pages.min()), int(pages.max()))
        self._see(pages, now_s)
        self._rung[pages] = np.maximum(self._rung[pages], np.uint8(Rung.DECLARED))

    def columns(self, now_s: float) -> HeatColumns:
        """A copy of what is known, with ages at `now_s`.

        One-bit rungs: the rate is the most likely one of a Poisson process, -ln(1 - p) / w, p being the decayed part of
        the sampled time in touched windows and w their decayed mean length. n windows that were all touched support
        any high rate; p is then taken as 1 - 1/(2n), n being the decayed number of windows when last sampled.
        """
        return snapshot((self,), now_s)

    def _in_range(self, first: int, last: int) -> None:
        if first < 0 or last >= self.pages:
            raise ValueError(f"pages {first} to {last} of a model that has pages 0 to {self.pages - 1}")

    def _window(self, seen: Bits | Counts, values: npt.NDArray[np.generic]) -> slice | npt.NDArray[np.int32]:
        """The rows of a window's pages; a slice, which is several times faster, if they have no gap."""
        if not (abs(seen.begin_s) < _TIME_LIMIT_S and abs(seen.end_s) < _TIME_LIMIT_S):
            raise ValueError(f"a window from {seen.begin_s} s to {seen.end_s} s: these are no times")
        if seen.rung <= Rung.DECLARED:
            raise ValueError(f"a window by rung {seen.rung.name}, which samples nothing")
        pages = seen.pages
        if pages.shape != (len(pages),) or values.shape != pages.shape:
            raise ValueError(f"pages of shape {pages.shape} with values of shape {values.shape}: one a page is needed")
        if not len(pages):
            return slice(0, 0)
        if not (pages[1:] > pages[:-1]).all():
            raise ValueError("page numbers of a window must ascend")
        first, last = int(pages[0]), int(pages[-1])
        self._in_range(first, last)
        return slice(first, last + 1) if last - first + 1 == len(pages) else pages

    def _see(self, pages: npt.NDArray[np.integer], at_s: float) -> None:
        self._last_s[pages] = np.fmax(self._last_s[pages], at_s)

    def _weight(self, end_s: float) -> float:
        """Weight of Counts that end now, after making it fit into float32."""
        self._watched_at_s = end_s = max(end_s, self._watched_at_s) if self._watched_windows else end_s
        age = (end_s - self._base_s) / self.half_life_s
        if age > _RESCALE:
            factor = 2.0**-age
            self._counted *= np.float32(factor)
            self._watched_s *= factor
        elif age >= 0:
            return float(2.0**age)
        self._base_s = end_s
        return 1.0


def snapshot(heats: Sequence[Heat], now_s: float) -> HeatColumns:
    """The columns of all pages of these models, one model after the other. See Heat.columns."""
    columns = _empty(sum(heat.pages for heat in heats))
    first = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        for parts in _blocks(heats):
            block = _Block(parts)
            rows = slice(first, first + block.pages)
            block.write({name: column[rows] for name, column in columns.items()}, now_s)
            first = rows.stop
    for column in columns.values():
        column.flags.writeable = False
    return HeatColumns(**columns)


def _empty(pages: int) -> dict[str, Any]:
    """Room for HeatColumns, in one piece: fresh memory is faulted in twice as fast as in eight."""
    widths = {name: np.dtype(dtype).itemsize for name, dtype in _COLUMNS.items()}
    room = np.empty(pages * sum(widths.values()), np.uint8)
    columns, first = {}, 0
    for name in sorted(widths, key=lambda name: -widths[name]):  # the widest first, so that all are aligned
        last = first + pages * widths[name]
        columns[name] = room[first:last].view(_COLUMNS[name])
        first = last
    return columns


def _saturated(old: npt.NDArray[np.uint32], added: npt.NDArray[np.generic] | int) -> npt.NDArray[np.uint32]:
    return old + np.minimum(added, ~old).astype(np.uint32, copy=False)


_Part = tuple[Heat, int, int]


def _blocks(heats: Sequence[Heat]) -> Iterator[list[_Part]]:
    """All pages in order, about _BLOCK at once: a part of a large model, or many small models."""
    parts: list[_Part] = []
    size = 0
    for heat in heats:
        for first in range(0, heat.pages, _BLOCK):
            last = min(first + _BLOCK, heat.pages)
            parts.append((heat, first, last))
            size += last - first
            if size >= _BLOCK:
                yield parts
                parts, size = [], 0
    if parts:
        yield parts


class _Block:
    """Pages of one or more models, whose figures are computed together."""

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts
        self._lengths = [last - first for _, first, last in parts]
        self.pages = sum(self._lengths)

    def _column(self, name: str) -> Any:
        if len(self._parts) == 1:
            heat, first, last = self._parts[0]
            return getattr(heat, name)[first:last]
        # Thousands of small models are common; to cut out the whole of each would take as long as all the rest.
        return np.concatenate([
            getattr(heat, name) if last - first == heat.pages else getattr(heat, name)[first:last]
            for heat, first, last in self._parts
        ])  # fmt: skip

    def _each(self, name: str, dtype: type[np.generic] = np.float64) -> Any:
        """A number of each model, at each of its pages."""
        values = np.array([getattr(heat, name) for heat, _, _ in self._parts], dtype)
        return values if len(values) == 1 else np.repeat(values, self._lengths)

    def write(self, to: dict[str, Any], now_s: float) -> None:
        """The arrays of HeatColumns, by name."""
        sampled_at = self._column("_sampled_at_s")
        to["sampled"][:] = self._column("_sampled")
        to["observed"][:] = self._column("_observed")
        to["rung"][:] = self._column("_rung")
        to["last_seen_s"][:] = self._column("_last_s")
        np.maximum(now_s - to["last_seen_s"], 0, out=to["age_s"], casting="same_kind")
        if any(heat._watched_windows for heat, _, _ in self._parts):
            sampled_at = self._write_counts(to, sampled_at)
        else:
            self._write_rate_of_bits(to["rate"])
        np.maximum(now_s - sampled_at, 0, out=to["sampled_age_s"], casting="same_kind")
        np.equal(sampled_at, sampled_at, out=to["known"])

    def _write_rate_of_bits(self, rate: npt.NDArray[np.float32]) -> None:
        exposed, windows = self._column("_exposed_s"), self._column("_windows")
        part = np.divide(self._column("_touched_s"), exposed, dtype=np.float64)
        untouched = np.subtract(1, part, out=part)
        np.maximum(untouched, 0.5 / windows, out=untouched)
        logarithm = np.log(untouched, out=untouched)
        logarithm *= windows / exposed
        np.abs(logarithm, out=rate, casting="same_kind")  # it is <= 0, and -0.0 reads badly

    def _write_counts(self, to: dict[str, Any], sampled_at: Any) -> Any:
        """Figures where Counts are the better source; returns when each page was last sampled."""
        watched_at, watched_windows = self._each("_watched_at_s"), self._each("_watched_windows", np.uint64)
        silent = watched_at < sampled_at - _PATIENCE * self._each("half_life_s")
        better = ~silent & (watched_windows > 0)
        if not better.all():
            self._write_rate_of_bits(to["rate"])
        np.divide(self._column("_counted"), self._each("_watched_s"), out=to["rate"], where=better, casting="same_kind")
        np.copyto(to["rung"], self._each("_counts_rung", np.uint8), where=better)
        to["sampled"][:] = _saturated(to["sampled"], np.minimum(watched_windows, _U32_MAX).astype(np.uint32))
        return np.fmax(sampled_at, watched_at)
