"""View: the frozen snapshot of a pool that a policy gets, as numpy columns. Holds no reference to the pool.

Rows are pages, in the order (model, segment, page); a column is an array with one entry a row. Everything is read-only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.types import PAGE_BYTES

UNBOUNDED = 1 << 62
"""Free bytes of a tier that never fills."""


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier; `id` is its index in the view's tiers, 0 the fastest.

    `kind`: hbm, dram, cxl or disk. Watermarks are free bytes: demote once less than `low_bytes` are free, until
    `high_bytes` are. Latencies are of one dependent load: `idle_latency_s` as measured at start, `latency_s` now.
    `load`: bytes read a second as observed, as a part of `bandwidth_bytes_s`. NaN where nobody measured.
    """

    id: int
    name: str
    kind: str
    capacity_bytes: int | None
    used_bytes: int
    low_bytes: int = 0
    high_bytes: int = 0
    idle_latency_s: float = float("nan")
    latency_s: float = float("nan")
    bandwidth_bytes_s: float = float("nan")
    load: float = float("nan")

    @property
    def free_bytes(self) -> int:
        return UNBOUNDED if self.capacity_bytes is None else self.capacity_bytes - self.used_bytes

    @property
    def is_memory(self) -> bool:
        """Pages move into it and out of it, invisibly to clients."""
        return self.kind in ("dram", "cxl")


class _Columns:
    """Arrays of one length."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Pages(_Columns):
    """One row a page of 2 MiB.

    id             i64  of the page, as long as the pool runs; ascends
    model          i32  index in `view.models`
    segment        i32  number within the model
    layer          i32  number of the layer within the model, in checkpoint order
    order          i32  position in the order in which a forward pass reads the model's pages
    tensor_class   i8   index in tiermem.types.TENSOR_CLASSES: what most of the page's bytes are
    tier           i8   a tier id, or LOADING; pages with a copy elsewhere stay in their tier
    replicas       u8   bit t: tier t has a further copy
    rate           f32  touches per second; NaN: unknown
    observed       u32  windows in which it was seen touched, and samples of it, since the model came: only grows
    age_s          f32  since it was last seen touched or asked for; NaN: never
    last_seen_s    f64  when that was; NaN: never
    sampled_age_s  f32  since it was last sampled; NaN: never
    rung           u8   by which means it was observed: 0 none, 1 declared, 2 accessed, 3 present, 4 perf
    known          bool sampled by a rung that can say "not touched": a rate of 0 then means cold
    last_used_s    f64  when a client opened the model or asked for the layer
    leased         bool a client reads the model: its pages may move, and may not be evicted
    pinned         bool neither moved nor evicted
    """

    id: npt.NDArray[np.int64]
    model: npt.NDArray[np.int32]
    segment: npt.NDArray[np.int32]
    layer: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    tensor_class: npt.NDArray[np.int8]
    tier: npt.NDArray[np.int8]
    replicas: npt.NDArray[np.uint8]
    rate: npt.NDArray[np.float32]
    observed: npt.NDArray[np.uint32]
    age_s: npt.NDArray[np.float32]
    last_seen_s: npt.NDArray[np.float64]
    sampled_age_s: npt.NDArray[np.float32]
    rung: npt.NDArray[np.uint8]
    known: npt.NDArray[np.bool_]
    last_used_s: npt.NDArray[np.float64]
    leased: npt.NDArray[np.bool_]
    pinned: npt.NDArray[np.bool_]


PAGE_DTYPES: dict[str, type[Any]] = {
    "id": np.int64, "model": np.int32, "segment": np.int32, "layer": np.int32, "order": np.int32,
    "tensor_class": np.int8, "tier": np.int8, "replicas": np.uint8, "rate": np.float32, "observed": np.uint32,
    "age_s": np.float32, "last_seen_s": np.float64, "sampled_age_s": np.float32, "rung": np.uint8, "known": np.bool_,
    "last_used_s": np.float64, "leased": np.bool_, "pinned": np.bool_,
}  # fmt: skip
"""The columns of Pages, in their order."""


@dataclass(frozen=True, slots=True)
class Models(_Columns):
    """One row a model. `rate`: touches of its pages per second, of those that are known. `last_open_s` NaN: never."""

    name: tuple[str, ...]
    nbytes: npt.NDArray[np.int64]
    opens: npt.NDArray[np.int64]
    last_open_s: npt.NDArray[np.float64]
    rate: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Run:
    """The pages of one whole segment: rows [first, first + pages)."""

    first: int
    pages: int
    last_used_s: float

    @property
    def nbytes(self) -> int:
        return self.pages * PAGE_BYTES


@dataclass(frozen=True)
class View:
    """What a policy sees. `now_s` is on the clock of the columns that end in `_s`, and may stand still or jump.

    `needed_bytes`: what a load waits for and no memory tier has free. `quota_bytes`: what may move until the next view,
    `period_s` after this one.
    """

    now_s: float
    tiers: tuple[TierView, ...]
    models: Models
    pages: Pages
    needed_bytes: int = 0
    quota_bytes: int = UNBOUNDED
    period_s: float = 1.0

    @cached_property
    def memory_tiers(self) -> tuple[TierView, ...]:
        """Tiers that pages move between, the fastest first."""
        return tuple(tier for tier in self.tiers if tier.is_memory)

    @cached_property
    def movable(self) -> npt.NDArray[np.bool_]:
        """Pages that lie in a memory tier and are not pinned."""
        memory = np.zeros(256, np.bool_)  # by tier code, negative ones counted from the end
        memory[[tier.id for tier in self.memory_tiers]] = True
        return memory[self.pages.tier.view(np.uint8)] & ~self.pages.pinned

    def evictable(self) -> Iterator[Run]:
        """Segments that lie wholly in memory tiers and are neither leased nor pinned, in row order."""
        pages = self.pages
        if not len(pages):
            return
        change = (np.diff(pages.model) != 0) | (np.diff(pages.segment) != 0)
        starts = np.concatenate(([0], np.flatnonzero(change) + 1))
        free = self.movable & ~pages.leased
        whole = np.logical_and.reduceat(free, starts)
        lengths = np.diff(np.concatenate((starts, [len(pages)])))
        for first, count in zip(starts[whole].tolist(), lengths[whole].tolist(), strict=True):
            yield Run(first, count, float(pages.last_used_s[first]))


@dataclass(frozen=True, slots=True)
class Request:
    """New pages that ask for a place: those of one model, in row order. Columns are as in Pages.

    `tiers`: as they are now; only memory tiers may be answered.
    """

    now_s: float
    model: str
    tiers: tuple[TierView, ...]
    segment: npt.NDArray[np.int32]
    layer: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    tensor_class: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.segment)


def fill_fastest(request: Request) -> npt.NDArray[np.int8]:
    """The fastest tier takes pages in their order until its low watermark, then the next one; what is left over goes
    wherever there is room, the slowest tier first. What a pool does with a policy that has no `place`."""
    placed = np.full(len(request), -1, np.int8)
    memory = [tier for tier in request.tiers if tier.is_memory]
    taken = dict.fromkeys((tier.id for tier in memory), 0)
    done = 0
    for tier, kept in [(t, t.low_bytes) for t in memory] + [(t, 0) for t in reversed(memory)]:
        room = max(0, tier.free_bytes - taken[tier.id] - kept) // PAGE_BYTES
        count = min(room, len(request) - done)
        placed[done : done + count] = tier.id
        taken[tier.id] += count * PAGE_BYTES
        done += count
    return placed
