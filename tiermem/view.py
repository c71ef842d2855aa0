"""Builds the frozen view that a policy sees from the pool's state. Never changes that state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from tiermem.catalog import ModelRecord
from tiermem.policy import Pages, TierView, View
from tiermem.tier import Tier

Place = tuple[ModelRecord, int]
"""A segment: the model and its number in it."""


def view_of(
    records: Iterable[ModelRecord],
    leased: Callable[[ModelRecord], bool],
    tiers: Sequence[Tier],
    needed: dict[int, int],
    now_s: float,
) -> tuple[View, dict[int, Place]]:
    """The view, and for the first row of each segment the segment. `needed`: tier id -> bytes that a load lacks.

    The pool's lock must be held; the arrays are copies.
    """
    models = list(records)
    places: dict[int, Place] = {}
    columns: list[tuple[np.ndarray, ...]] = []
    row = 0
    for number, record in enumerate(models):
        counts = np.diff(record.first_page)
        total = int(counts.sum())
        for segment, first in enumerate(record.first_page[:-1]):
            places[row + first] = (record, segment)
        columns.append((
            np.full(total, number, np.int32),
            np.repeat(np.arange(len(counts), dtype=np.int32), counts),
            record.residency,
            np.repeat(record.last_used_s, counts),
            np.full(total, leased(record)),
            np.full(total, record.pins > 0),
        ))  # fmt: skip
        row += total
    if columns:
        arrays = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    else:
        arrays = [np.empty(0, t) for t in (np.int32, np.int32, np.int8, np.float64, np.bool_, np.bool_)]
    for array in arrays:
        array.flags.writeable = False
    views = tuple(TierView(t.id, t.name, t.capacity_bytes, t.used_bytes, needed.get(t.id, 0)) for t in tiers)
    return View(now_s, views, tuple(record.name for record in models), Pages(*arrays)), places
