"""Plan: the moves that a policy asks for, and whether they can be asked for at all. Never acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.errors import PolicyError
from tiermem.policy.view import Run, View
from tiermem.types import PAGE_BYTES

MAX_MOVES = 1 << 17
"""Moves of one plan: 256 GiB, page by page."""


@dataclass(frozen=True, slots=True)
class Move:
    """Rows [first, first + pages) of the view's pages go from tier `source` to tier `target`.

    To disk means to evict: the rows are those of one whole segment. `copy` makes a replica in `target` and leaves the
    page where it is, in `source`; `drop` gives the replica in `source` up, `target` being where the page is anyway.
    """

    first: int
    pages: int
    source: int
    target: int
    reason: str
    kind: str = "move"


Plan = list[Move]


def moves(view: View, rows: npt.NDArray[np.integer], target: int, reason: str, kind: str = "move") -> Plan:
    """Moves of these rows to tier `target`, in the order given: neighbours of one segment and tier become one move."""
    if not len(rows):
        return []
    pages = view.pages
    rows = np.asarray(rows, np.int64)
    segment, model, tier = pages.segment[rows], pages.model[rows], pages.tier[rows]
    breaks = (np.diff(rows) != 1) | (np.diff(segment) != 0) | (np.diff(model) != 0) | (np.diff(tier) != 0)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lengths = np.diff(np.concatenate((starts, [len(rows)])))
    columns = (rows[starts].tolist(), lengths.tolist(), tier[starts].tolist())
    return [Move(first, count, source, target, reason, kind) for first, count, source in zip(*columns, strict=True)]


def evictions(view: View, coldness: Callable[[Run], tuple[float, ...]] | None = None) -> Plan:
    """Evict whole segments until `view.needed_bytes` fit: those of the greatest coldness, by default those unused for
    longest, last layer first: the first layers are needed first when a model is opened again.

    Empty without need.
    """
    if view.needed_bytes <= 0:
        return []
    key = coldness or (lambda run: (view.now_s - run.last_used_s, float(run.first)))
    disk, plan, needed = view.tiers[-1].id, Plan(), view.needed_bytes
    for run in sorted(view.evictable(), key=key, reverse=True):
        if needed <= 0:
            break
        source = int(view.pages.tier[run.first])
        plan.append(Move(run.first, run.pages, source, disk, f"unused for {view.now_s - run.last_used_s:.1f} s"))
        needed -= run.nbytes
    return plan


def check_plan(view: View, plan: object) -> Plan:
    """The plan, if it is possible as of this view. Raises PolicyError that names the move and what is wrong with it."""
    if not isinstance(plan, list):
        raise PolicyError(f"plan(view) must return a list of moves, not {type(plan).__name__}")
    if len(plan) > MAX_MOVES:
        raise PolicyError(f"a plan of {len(plan)} moves; {MAX_MOVES} may be: join neighbouring pages to runs")
    check = _Check(view)
    for number, move in enumerate(plan):
        try:
            check.add(move)
        except PolicyError as error:
            raise PolicyError(f"move {number} of the plan, {_short(move)}: {error}") from None
    return plan


def _short(move: object) -> str:
    text = repr(move)
    return text if len(text) <= 200 else text[:200] + "..."


class _Check:
    """The state of a view while the moves of a plan are done to it in order."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._tier = view.pages.tier.copy()
        self._replicas = view.pages.replicas.copy()
        self._free = {tier.id: tier.free_bytes for tier in view.tiers}

    def add(self, move: object) -> None:
        if not isinstance(move, Move):
            raise PolicyError("it is no tiermem.policy.Move")
        for name in ("first", "pages", "source", "target"):
            # numpy's integers are as good as Python's; True is neither.
            if not isinstance(getattr(move, name), int | np.integer) or isinstance(getattr(move, name), bool):
                raise PolicyError(f"{name} must be a whole number")
        if not isinstance(move.reason, str):
            raise PolicyError("reason must be text")
        if move.pages <= 0 or move.first < 0 or move.first + move.pages > len(self._tier):
            raise PolicyError(f"the view has rows 0 to {len(self._tier) - 1}")
        for tier in (move.source, move.target):
            if tier not in self._free:
                raise PolicyError(f"there is no tier {tier}; the view has {len(self._view.tiers)}")
        rows = slice(move.first, move.first + move.pages)
        if self._view.pages.pinned[rows].any():
            raise PolicyError("a page of it is pinned")
        step = {"move": self._move, "copy": self._copy, "drop": self._drop}.get(move.kind)
        if step is None:
            raise PolicyError("kind must be move, copy or drop")
        step(move, rows)

    def _move(self, move: Move, rows: slice) -> None:
        tiers = self._view.tiers
        if move.target == tiers[-1].id:
            self._evict(move, rows)
        elif not (tiers[move.source].is_memory and tiers[move.target].is_memory):
            raise PolicyError("pages move between memory tiers, or to disk; other tiers take copies")
        elif move.source == move.target:
            raise PolicyError("it moves nothing")
        elif not (self._tier[rows] == move.source).all():
            raise PolicyError(f"not all of its pages are in tier {move.source}")
        else:
            self._take(move.target, move.pages)
            self._free[move.source] += move.pages * PAGE_BYTES
            self._tier[rows] = move.target

    def _evict(self, move: Move, rows: slice) -> None:
        pages = self._view.pages
        if pages.leased[rows].any():
            raise PolicyError("its model is leased, and what a client reads is not evicted")
        neighbours = [row for row in (rows.start - 1, rows.stop) if 0 <= row < len(self._tier)]
        same = (pages.model[rows] == pages.model[rows.start]) & (pages.segment[rows] == pages.segment[rows.start])
        ends = all(
            pages.model[row] != pages.model[rows.start] or pages.segment[row] != pages.segment[rows.start]
            for row in neighbours
        )
        if not (same.all() and ends):
            raise PolicyError("only whole segments, one by one, are evicted")
        if not all(code in self._free and self._view.tiers[code].is_memory for code in set(self._tier[rows].tolist())):
            raise PolicyError("not all of its pages are in memory")
        for code in self._tier[rows].tolist():
            self._free[code] += PAGE_BYTES
        self._tier[rows] = move.target

    def _copy(self, move: Move, rows: slice) -> None:
        target = self._view.tiers[move.target]
        if target.is_memory or target.id == self._view.tiers[-1].id:
            raise PolicyError(f"tier {target.name} takes no copies; pages move there")
        if not (self._tier[rows] == move.source).all() or (self._replicas[rows] >> move.target & 1).any():
            raise PolicyError(f"its pages must be in tier {move.source} and have no copy in tier {move.target}")
        self._take(move.target, move.pages)
        self._replicas[rows] |= np.uint8(1 << move.target)

    def _drop(self, move: Move, rows: slice) -> None:
        if not (self._replicas[rows] >> move.source & 1).all():
            raise PolicyError(f"not all of its pages have a copy in tier {move.source}")
        self._free[move.source] += move.pages * PAGE_BYTES
        self._replicas[rows] &= np.uint8(255 ^ (1 << move.source))

    def _take(self, tier: int, pages: int) -> None:
        if pages * PAGE_BYTES > self._free[tier]:
            free = max(0, self._free[tier]) // PAGE_BYTES
            raise PolicyError(f"tier {self._view.tiers[tier].name} has room for {free} pages by then")
        self._free[tier] -= pages * PAGE_BYTES
