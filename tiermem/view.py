"""Builds the frozen view that a policy sees from the pool's state. Never changes that state.

The pool's lock must be held; the arrays are copies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tiermem.catalog import ModelRecord
from tiermem.heat import Heat, snapshot
from tiermem.page_facts import PageFacts, page_facts_of
from tiermem.policy import PAGE_DTYPES, Models, Pages, Request, View
from tiermem.tier import Tiers
from tiermem.types import PAGE_BYTES

Place = tuple[ModelRecord, int]
"""A segment: the model and its number in it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Pages of one segment: `pages` are their numbers within it."""

    record: ModelRecord
    segment: int
    pages: range

    @property
    def rows(self) -> slice:
        """Page numbers within the model."""
        first = self.record.first_page[self.segment]
        return slice(first + self.pages.start, first + self.pages.stop)


class Rows:
    """What the rows of a view are: the models' pages, one model after another."""

    def __init__(self, records: list[ModelRecord]) -> None:
        self._records = records
        self._first = np.concatenate(([0], np.cumsum([record.first_page[-1] for record in records]))).tolist()

    def pieces(self, first: int, count: int) -> Iterator[Piece]:
        """Rows [first, first + count), segment by segment."""
        last = first + count
        while first < last:
            number = bisect_right(self._first, first) - 1
            record, page = self._records[number], first - self._first[number]
            segment = bisect_right(record.first_page, page) - 1
            end = min(record.first_page[segment + 1], page + last - first)
            base = record.first_page[segment]
            yield Piece(record, segment, range(page - base, end - base))
            first += end - page


class Views:
    """Makes the views of one pool: `heat` gives a model's heat, `leased` whether anybody reads it, `pinned` which of
    its pages must stay."""

    def __init__(
        self,
        tiers: Tiers,
        heat: Callable[[ModelRecord], Heat],
        leased: Callable[[ModelRecord], bool],
        pinned: Callable[[ModelRecord], npt.NDArray[np.bool_]],
    ) -> None:
        self._tiers, self._heat, self._leased, self._pinned = tiers, heat, leased, pinned
        self._facts: WeakKeyDictionary[ModelRecord, PageFacts] = WeakKeyDictionary()

    def facts(self, record: ModelRecord) -> PageFacts:
        found = self._facts.get(record)
        if found is None:
            found = self._facts[record] = page_facts_of(record.manifest)
        return found

    def view(
        self, records: Iterable[ModelRecord], now_s: float, needed_bytes: int = 0, quota_bytes: int = 1 << 62,
        period_s: float = 1.0,
    ) -> tuple[View, Rows]:  # fmt: skip
        """The view of these models, and what its rows are."""
        models = list(records)
        heat = snapshot([self._heat(record) for record in models], now_s)
        counts = [record.first_page[-1] for record in models]
        facts = [self.facts(record) for record in models]
        columns: dict[str, npt.NDArray[Any]] = {
            "id": _joined([np.arange(r.first_id, r.first_id + n) for r, n in zip(models, counts, strict=True)], "id"),
            "model": np.repeat(np.arange(len(models), dtype=np.int32), counts),
            "tier": _joined([record.residency for record in models], "tier"),
            "replicas": _joined([record.replicas for record in models], "replicas"),
            "last_used_s": _joined([np.repeat(r.last_used_s, np.diff(r.first_page)) for r in models], "last_used_s"),
            "leased": np.repeat(np.array([self._leased(record) for record in models], np.bool_), counts),
            "pinned": _joined([self._pinned(record) for record in models], "pinned"),
        }
        for name in ("segment", "layer", "order", "tensor_class"):
            columns[name] = _joined([getattr(fact, name) for fact in facts], name)
        for array in columns.values():
            array.flags.writeable = False
        for name in PAGE_DTYPES.keys() - columns.keys():
            columns[name] = getattr(heat, name)
        rate = np.nan_to_num(columns["rate"])
        pages = Pages(**columns)
        view = View(
            now_s,
            tuple(tier.view(_load(tier.id, pages.tier, rate, tier.speed.bandwidth_bytes_s)) for tier in self._tiers),
            _models(models, pages, rate),
            pages, needed_bytes, quota_bytes, period_s,
        )  # fmt: skip
        return view, Rows(models)

    def request(self, record: ModelRecord, segments: list[int], now_s: float) -> Request:
        """For the pages of these segments, ascending."""
        facts = self.facts(record)
        rows = np.concatenate([np.arange(*record.pages(i).indices(len(facts.order))) for i in segments])
        columns = [getattr(facts, name)[rows] for name in ("segment", "layer", "order", "tensor_class")]
        for column in columns:
            column.flags.writeable = False
        return Request(now_s, record.name, tuple(tier.view() for tier in self._tiers), *columns)


def _joined(parts: list[npt.NDArray[Any]], name: str) -> npt.NDArray[Any]:
    dtype = PAGE_DTYPES[name]
    return np.concatenate(parts, dtype=dtype) if parts else np.empty(0, dtype)


def _models(records: list[ModelRecord], pages: Pages, rate: npt.NDArray[np.float32]) -> Models:
    columns = (
        np.array([record.manifest.nbytes for record in records], np.int64),
        np.array([record.opens for record in records], np.int64),
        np.array([record.last_used_s.max(initial=-np.inf) for record in records], np.float64),
        np.bincount(pages.model, rate, len(records)).astype(np.float64),
    )
    columns[2][columns[1] == 0] = np.nan
    for column in columns:
        column.flags.writeable = False
    return Models(tuple(record.name for record in records), *columns)


def _load(tier: int, tiers: npt.NDArray[np.int8], rate: npt.NDArray[np.float32], bandwidth_bytes_s: float) -> float:
    """Bytes a second that touches of whole pages would read, as a part of the bandwidth."""
    return float(rate[tiers == tier].sum(dtype=np.float64)) * PAGE_BYTES / bandwidth_bytes_s
