"""Sample views: what a pool could look like, made from a seed. For checks, tests and benchmarks; measures nothing.

Equal arguments give equal views.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.policy.view import PAGE_DTYPES, UNBOUNDED, Models, Pages, Request, TierView, View
from tiermem.types import LOADING, PAGE_BYTES, TENSOR_CLASSES

_LATENCY_S = (90e-9, 250e-9, 400e-9)
_BANDWIDTH_BYTES_S = (100e9, 25e9, 10e9)
_RUNG_PRESENT = 3
_PAGES_PER_MODEL = 512
_SPAN_S = 600.0
"""How long the pool has watched."""


def sample_view(
    pages: int,
    seed: int = 0,
    *,
    memory_tiers: int = 2,
    full: float = 0.9,
    known: float = 0.9,
    needed_bytes: int = 0,
    quota_bytes: int = UNBOUNDED,
    now_s: float = 1000.0,
) -> View:
    """A view of `pages` rows: a model for every 512, of heavy-tailed size, with 8 to 64 layers; a third are leased.

    Models are used by Zipf's law, so are the experts in them; `known` is the part of the pages that a sampler saw.
    `memory_tiers` (1 to 3: DRAM, then CXL, each three times as large) are full to the part `full`; of the segments 5 %
    are on disk and 1 % is loading, whole; of the pages 1 % is pinned.
    """
    random = np.random.default_rng(seed)
    model, segment, order, sizes = _layout(random, pages)
    columns: dict[str, npt.NDArray[Any]] = {"model": model, "segment": segment, "layer": segment, "order": order}
    columns["id"] = np.cumsum(random.integers(1, 4, pages))
    columns["tensor_class"] = _classes(random, model, segment, sizes)
    columns["tier"] = _residency(random, model, segment, memory_tiers)
    columns["replicas"] = np.zeros(pages)
    popularity = random.permutation(1 / np.arange(1, len(sizes) + 1))
    _heat(random, columns, popularity, known, now_s)
    columns["leased"] = (random.random(len(sizes)) < 1 / 3)[model]
    columns["pinned"] = random.random(pages) < 0.01
    frozen = _frozen({name: columns[name].astype(dtype) for name, dtype in PAGE_DTYPES.items()})
    rows = Pages(**frozen)
    models = Models(name=tuple(f"model-{number}" for number in range(len(sizes))), **_frozen({
        "nbytes": sizes * PAGE_BYTES,
        "opens": random.poisson(popularity * 100).astype(np.int64),
        "last_open_s": now_s - random.exponential(10 / popularity),
        "rate": np.bincount(model, np.nan_to_num(rows.rate), len(sizes)),
    }))  # fmt: skip
    return View(now_s, _tiers(rows.tier, memory_tiers, full), models, rows, needed_bytes, quota_bytes)


def with_device(view: View, places: int) -> View:
    """The view of a pool that also has a device, as tier 0: room for copies of so many pages, of which pages that
    somebody reads have half."""
    pages, device = view.pages, TierView(0, "hbm@npu:0", "hbm", places * PAGE_BYTES, 0)
    copied = np.flatnonzero(pages.leased & (pages.tier >= 0) & (pages.tier < len(view.tiers) - 1))[: places // 2]
    columns = {"tier": np.where(pages.tier < 0, pages.tier, pages.tier + 1).astype(np.int8)}
    columns["replicas"] = np.zeros(len(pages), np.uint8)
    columns["replicas"][copied] = 1
    tiers = (replace(device, used_bytes=len(copied) * PAGE_BYTES), *(replace(t, id=t.id + 1) for t in view.tiers))
    return replace(view, tiers=tiers, pages=replace(pages, **_frozen(columns)))


def sample_request(pages: int, tiers: tuple[TierView, ...], seed: int = 0) -> Request:
    """A new model of so many pages, 32 layers in their order, that asks for a place in these tiers."""
    random = np.random.default_rng(seed)
    segment = (np.arange(pages) * 32 // max(pages, 1)).astype(np.int32)
    sizes = np.array([pages])
    columns = _frozen({
        "segment": segment, "layer": segment.copy(), "order": np.arange(pages, dtype=np.int32),
        "tensor_class": _classes(random, np.zeros(pages, np.int32), segment, sizes),
    })  # fmt: skip
    return Request(1000.0, "new", tiers, **columns)


def subset(view: View, models: npt.NDArray[np.bool_]) -> View:
    """The view without the models that are False here: they left the pool, or have yet to come. Tiers stay."""
    pages, numbers = view.pages, (np.cumsum(models) - 1).astype(np.int32)
    rows = models[pages.model]
    columns = {name: getattr(pages, name)[rows] for name in PAGE_DTYPES}
    columns["model"] = numbers[columns["model"]]
    per_model = {name: getattr(view.models, name)[models] for name in ("nbytes", "opens", "last_open_s", "rate")}
    names = tuple(name for name, kept in zip(view.models.name, models.tolist(), strict=True) if kept)
    return replace(view, models=Models(name=names, **_frozen(per_model)), pages=Pages(**_frozen(columns)))


def _frozen(columns: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    for column in columns.values():
        column.flags.writeable = False
    return columns


def _layout(random: np.random.Generator, pages: int) -> tuple[npt.NDArray[Any], ...]:
    """(model, segment, position in the model) of each page, and the pages of each model."""
    count = max(1, pages // _PAGES_PER_MODEL) if pages else 0
    weights = random.pareto(1.5, count) + 0.2
    cuts = np.floor(np.cumsum(weights) / max(weights.sum(), 1e-9) * (pages - count) + 0.5).astype(np.int64)
    sizes = np.diff(cuts, prepend=0) + 1  # no model without a page
    model = np.repeat(np.arange(count), sizes)
    position = np.arange(pages) - (np.cumsum(sizes) - sizes)[model]
    layers = np.minimum(random.integers(8, 65, count), sizes)
    return model, position * layers[model] // sizes[model], position, sizes


def _classes(
    random: np.random.Generator, model: npt.NDArray[Any], segment: npt.NDArray[Any], sizes: npt.NDArray[Any]
) -> npt.NDArray[np.int8]:
    """Embeddings first, the head last, between them attention (a third) and experts or, in every other model, MLPs."""
    code = {name: number for number, name in enumerate(TENSOR_CLASSES)}
    last = np.zeros(len(sizes), np.int64)
    np.maximum.at(last, model, segment)
    body = np.where(model % 2 == 0, code["expert"], code["mlp"])
    body = np.where(random.random(len(model)) < 1 / 3, code["attention"], body)
    body = np.where(segment == last[model], code["head"], body)
    return np.where(segment == 0, code["embedding"], body).astype(np.int8)


def _residency(
    random: np.random.Generator, model: npt.NDArray[Any], segment: npt.NDArray[Any], memory_tiers: int
) -> npt.NDArray[Any]:
    weights = 3.0 ** np.arange(memory_tiers)
    tier = random.choice(memory_tiers, len(model), p=weights / weights.sum())
    fate = random.random((len(model), 1))[_segment_starts(model, segment), 0]
    return np.where(fate < 0.05, memory_tiers, np.where(fate < 0.06, LOADING, tier))


def _segment_starts(model: npt.NDArray[Any], segment: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """The first row of each row's segment."""
    starts = np.flatnonzero(np.diff(model, prepend=-1) | np.diff(segment, prepend=-1))
    return np.repeat(starts, np.diff(starts, append=len(model)))


def _heat(
    random: np.random.Generator, columns: dict[str, npt.NDArray[Any]], popularity: npt.NDArray[Any], known: float,
    now_s: float,
) -> None:  # fmt: skip
    model, pages = columns["model"], len(columns["model"])
    expert = columns["tensor_class"] == TENSOR_CLASSES.index("expert")
    share = np.where(expert, np.minimum(1.0, 0.02 / (1 - random.random(pages))), 1.0)  # 1/u: Zipf's tail
    rate = 20.0 * popularity[model] * share
    rate[rate < 0.01] = 0.0
    seen = random.random(pages) < known
    touched = seen & (rate > 0)
    age_s = random.exponential(1.0, pages) / np.where(rate > 0, rate, 1.0)
    columns["rate"] = np.where(seen, rate, np.nan)
    columns["observed"] = np.where(seen, random.poisson(rate * _SPAN_S * 0.01), 0)
    columns["age_s"] = np.where(touched, age_s, np.nan)
    columns["last_seen_s"] = np.where(touched, now_s - age_s, np.nan)
    columns["sampled_age_s"] = np.where(seen, random.uniform(0, 5, pages), np.nan)
    columns["rung"] = np.where(seen, _RUNG_PRESENT, 0)
    columns["known"] = seen
    starts = _segment_starts(model, columns["segment"])
    columns["last_used_s"] = now_s - (random.exponential(1.0, pages) / np.maximum(popularity[model], 1e-3))[starts]


def _tiers(tier: npt.NDArray[np.int8], memory_tiers: int, full: float) -> tuple[TierView, ...]:
    tiers = []
    for number in range(memory_tiers):
        used = int((tier == number).sum())
        capacity = max(1, used, round(used / full))
        low, high = round(capacity * 0.02) * PAGE_BYTES, round(capacity * 0.04) * PAGE_BYTES
        idle_s, bandwidth = _LATENCY_S[number], _BANDWIDTH_BYTES_S[number]
        kind, name = ("dram", "dram") if number == 0 else ("cxl", "cxl" if memory_tiers < 3 else f"cxl{number}")
        tiers.append(TierView(number, name, kind, capacity * PAGE_BYTES, used * PAGE_BYTES, low, high,
                              idle_s, idle_s * 1.3, bandwidth, 0.4))  # fmt: skip
    disk = int((tier == memory_tiers).sum()) * PAGE_BYTES
    return (*tiers, TierView(memory_tiers, "disk", "disk", None, disk))
