"""Rollup: heat of pages summed up by tensor, expert, layer and model, and the tensor at an address. Pure arithmetic.

A row's pages are all those that its bytes overlap, and each counts in full: the first and the last page of a tensor
belong to its neighbours as well, so that rows of tensors or experts do not add up to the model's. Rows of layers do,
for a page holds one layer. Nothing is shared out in proportion: nobody saw which part of a page was touched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tiermem.checkpoint.layers import layer_of
from tiermem.heat import HeatColumns
from tiermem.observations import Rung
from tiermem.types import PAGE_BYTES, Manifest, TensorInfo

By = Literal["tensor", "expert", "layer", "model"]


class Expert(NamedTuple):
    """One expert of one layer."""

    layer: str
    number: int

    def __str__(self) -> str:
        return f"{self.layer} expert {self.number}"


@dataclass(frozen=True, slots=True)
class Table:
    """One row a tensor, expert, layer or model, in the order of the manifest; arrays as long as `names`.

    `keys`: the Expert of each row of a table by expert, else the name. `nbytes`: of the weights alone. `pages`: those
    they overlap; of these `known` were sampled and `touched` were seen touched by a sampler. `mean_rate`, `max_rate`:
    over the known pages, touches per second, NaN if none is known. `observed`: the sum over the pages. `age_s`: of the
    page seen last, NaN if none ever was. `rungs`: which rungs the figures are from, bit r for Rung(r).
    """

    by: By
    keys: tuple[str | Expert, ...]
    nbytes: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]
    known: npt.NDArray[np.int64]
    touched: npt.NDArray[np.int64]
    mean_rate: npt.NDArray[np.float64]
    max_rate: npt.NDArray[np.float64]
    observed: npt.NDArray[np.int64]
    age_s: npt.NDArray[np.float64]
    rungs: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(str(key) for key in self.keys)

    def rungs_of(self, row: int) -> tuple[Rung, ...]:
        """The rungs of a row, least first."""
        return tuple(rung for rung in Rung if int(self.rungs[row]) >> rung & 1)


class Part(NamedTuple):
    """`nbytes` bytes from byte `start` of a model's pages, side by side in the order of its segments."""

    start: int
    nbytes: int

    @property
    def first_page(self) -> int:
        return self.start // PAGE_BYTES

    @property
    def last_page(self) -> int:
        """One past the last; an empty part has none."""
        return -(-(self.start + self.nbytes) // PAGE_BYTES) if self.nbytes else self.first_page


def rollup(manifest: Manifest, columns: HeatColumns, by: By, name: str = "") -> Table:
    """The table of one model. `columns`: its pages alone. `name`: of the model, for the row of a table by model.

    Raises ValueError if `columns` are not of as many pages as the manifest has.
    """
    pages = sum(segment.pages for segment in manifest.segments)
    if len(columns) != pages:
        raise ValueError(f"{len(columns)} rows of heat for {manifest.path}, which has {pages} pages")
    groups: dict[str | Expert, list[Part]] = {}
    if by == "expert":
        groups.update(experts_of(manifest).items())
    else:
        for tensor, start in zip(manifest.tensors, _starts(manifest), strict=True):
            key = {"tensor": tensor.name, "layer": manifest.segments[tensor.extent.segment].layer}.get(by, name)
            groups.setdefault(key, []).append(Part(start, tensor.nbytes))
    return _table(by, groups, columns)


_OF_EXPERT = re.compile(r"(?:^|.*\.)experts\.(\d+)\.")
_FUSED = re.compile(r"((?:^|.*\.)experts)\.\D")


def experts_of(manifest: Manifest) -> dict[Expert, list[Part]]:
    """Where the weights of each expert are, by layer and number; empty for a model without experts.

    Two namings, as Hugging Face's models have them: `...experts.5.w1.weight` is of expert 5, and
    `...experts.gate_up_proj` holds all of them, one after another along its first dimension. How many those are is
    what the tensors of three or more dimensions under one `experts` agree on; others with that first dimension (biases)
    are cut likewise, and tensors whose slices do not lie on whole bytes, or that do not agree, are of no expert.
    Shared experts (`shared_experts.`) are used by every token, and are none of these.
    """
    found: dict[Expert, list[Part]] = defaultdict(list)
    fused: dict[str, list[tuple[TensorInfo, int]]] = defaultdict(list)
    for tensor, start in zip(manifest.tensors, _starts(manifest), strict=True):
        if match := _OF_EXPERT.match(tensor.name):
            found[Expert(layer_of(tensor.name), int(match[1]))].append(Part(start, tensor.nbytes))
        elif (match := _FUSED.match(tensor.name)) and tensor.shape:
            fused[match[1]].append((tensor, start))
    for tensors in fused.values():
        counts = {tensor.shape[0] for tensor, _ in tensors if len(tensor.shape) >= 3}
        if len(counts) != 1 or (count := counts.pop()) == 0:
            continue
        for tensor, start in tensors:
            nbytes, rest = divmod(tensor.nbytes, count)
            if tensor.shape[0] == count and not rest:
                layer = layer_of(tensor.name)
                for number in range(count):
                    found[Expert(layer, number)].append(Part(start + number * nbytes, nbytes))
    return dict(found)


class TensorIndex:
    """Finds the tensor at an offset of a model's pages. Made once a manifest, asked for many samples."""

    def __init__(self, manifest: Manifest) -> None:
        starts = np.array(_starts(manifest), np.uint64)
        nbytes = np.array([tensor.nbytes for tensor in manifest.tensors], np.uint64)
        numbers = np.flatnonzero(nbytes)  # an empty tensor lies nowhere
        self._numbers = numbers[np.argsort(starts[numbers])].astype(np.int32)
        self._starts = starts[self._numbers]
        self._stops = self._starts + nbytes[self._numbers]

    def find(self, offset: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """Number in the manifest, int32, of the tensor at each offset (Resolved.offset where it is ours), or -1."""
        if not len(self._numbers):
            return np.full(len(offset), -1, np.int32)
        at = np.maximum(np.searchsorted(self._starts, offset, "right") - 1, 0)
        inside = (self._starts[at] <= offset) & (offset < self._stops[at])
        return np.where(inside, self._numbers[at], np.int32(-1))


def _starts(manifest: Manifest) -> list[int]:
    """Byte where each tensor begins in the model's pages."""
    first_page = [0]
    for segment in manifest.segments:
        first_page.append(first_page[-1] + segment.pages)
    return [first_page[t.extent.segment] * PAGE_BYTES + t.extent.offset for t in manifest.tensors]


def _runs(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """The pages of these parts as runs [first, last) that neither overlap nor touch: no page counts twice."""
    runs: list[tuple[int, int]] = []
    for first, last in sorted((part.first_page, part.last_page) for part in parts if part.nbytes):
        if runs and first <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], last)
        else:
            runs.append((first, last))
    return runs


def _table(by: By, groups: dict[str | Expert, list[Part]], columns: HeatColumns) -> Table:
    runs = [(first, last, row) for row, parts in enumerate(groups.values()) for first, last in _runs(parts)]
    runs.sort()  # so that what reduceat computes between two runs stays small
    rows = np.array([row for _, _, row in runs], np.intp)
    edges = np.array([(first, last) for first, last, _ in runs], np.intp).reshape(-1)
    known, rate = columns.known, columns.rate.astype(np.float64)

    def total(values: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
        return _reduce(np.add, values.astype(np.int64), edges, rows, len(groups), 0)

    known_pages = total(known)
    with np.errstate(invalid="ignore"):
        sum_rate = _reduce(np.add, np.where(known, rate, 0), edges, rows, len(groups), 0)
        mean_rate = sum_rate / known_pages
    max_rate = _reduce(np.maximum, np.where(known, rate, -np.inf), edges, rows, len(groups), -np.inf)
    age = columns.age_s.astype(np.float64)
    age = _reduce(np.minimum, np.where(np.isnan(age), np.inf, age), edges, rows, len(groups), np.inf)
    seen = np.where(columns.rung > 0, 1 << columns.rung, 0).astype(np.uint8)
    arrays = (
        np.array([sum(part.nbytes for part in parts) for parts in groups.values()], np.int64),
        total(np.ones(len(columns))), known_pages, total(columns.observed > 0), mean_rate,
        np.where(known_pages > 0, max_rate, np.nan), total(columns.observed), np.where(np.isinf(age), np.nan, age),
        _reduce(np.bitwise_or, seen, edges, rows, len(groups), 0),
    )  # fmt: skip
    for array in arrays:
        array.flags.writeable = False
    return Table(by, tuple(groups), *arrays)


def _reduce(
    operation: np.ufunc,
    values: npt.NDArray[Any],
    edges: npt.NDArray[np.intp],
    rows: npt.NDArray[np.intp],
    count: int,
    nothing: float,
) -> npt.NDArray[Any]:
    """`operation` over the pages of each row; `nothing` where it has none. Run i is [edges[2i], edges[2i + 1])."""
    result = np.full(count, nothing, values.dtype)
    if len(rows):
        padded = np.append(values, values[:1])  # a run may end where the pages do
        operation.at(result, rows, operation.reduceat(padded, edges)[::2])
    return result
