"""Heat of a recording: which pages were touched, which are cold, and of which nobody knows, by model or part of it.

Rates are means over the whole recording: nothing decays. Three states, of which each page has one: touched (a sampler
saw it touched), cold (a sampler looked and never saw it touched), unknown (nobody looked).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tiermem.heat import Heat, HeatColumns
from tiermem.observations import Counts, Rung
from tiermem.perfdata import PerfData
from tiermem.recording import RecordedModel, Recording
from tiermem.report.mappings import MappedPages
from tiermem.rollup import By, Expert, Table, rollup
from tiermem.types import PAGE_BYTES

_NO_DECAY_S = 1e12
_WINDOWS = 100
_MAX_PERIOD = 1 << 47


@dataclass(frozen=True, slots=True)
class HeatRow:
    """One model, layer, tensor, expert or page. `part` names it within the model; of a page it is the layer, and
    `page` its number in the model. `pages` = touched + cold + unknown.

    `observed`: windows in which a page was touched, and samples, summed up. `touches_per_s`: mean of the pages that
    were watched; None where none was. `age_s`: since a page was last seen, at the end of the recording.
    """

    model: str
    part: str
    page: int | None
    nbytes: int
    pages: int
    touched: int
    cold: int
    unknown: int
    observed: int
    touches_per_s: float | None
    age_s: float | None
    rungs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileRow:
    """One mapped file of a perf.data file, or one 2 MiB page of it: `page` in the file, in the address space for
    `[anon]`. `share`: its part of all samples. Of pages without a row nothing is known: no row says cold."""

    file: str
    page: int | None
    pages: int
    samples: int
    share: float


def heat(recording: Recording, by: By | str = "layer") -> list[HeatRow]:
    """The rows of all models, in the order of the checkpoint; `by` is model, layer, tensor, expert or page.

    Raises ValueError for another `by`.
    """
    if by not in ("model", "layer", "tensor", "expert", "page"):
        raise ValueError(f"heat by {by!r}: one of model, layer, tensor, expert, page is needed")
    rows: list[HeatRow] = []
    for number, model in enumerate(recording.models):
        columns, states = _columns(recording, number)
        if by == "page":
            rows += _page_rows(model, columns, states)
        else:
            rates, counts = (rollup(model.manifest, c, by, model.name) for c in (columns, states))
            rows += _table_rows(model, rates, counts)
    return rows


def _columns(recording: Recording, number: int) -> tuple[HeatColumns, HeatColumns]:
    """Heat of a model's pages, and the same with what was seen by events that cannot tell that a page is cold: that
    makes their pages known, touched, and of no rate."""
    model = recording.models[number]
    heat = Heat(model.pages, _NO_DECAY_S)
    for window in sorted(recording.windows, key=lambda window: window.bits.end_s):
        if window.model == number:
            heat.add_bits(window.bits)
    watches = np.array([event.rung is Rung.PERF for event in recording.events] + [False])
    mine = recording.resolved.model == number
    watched = mine & watches[recording.samples["event"]] if len(watches) > 1 else mine & False
    if watches.any():
        for counts in _counts(recording, watched):
            heat.add_counts(counts)
    columns = heat.columns(recording.end_s)
    seen = np.bincount(recording.resolved.page[mine & ~watched], minlength=model.pages)
    observed = np.minimum(columns.observed + seen, np.iinfo(np.uint32).max).astype(np.uint32)
    return columns, dataclasses.replace(columns, observed=observed, known=columns.known | (seen > 0))


def _counts(recording: Recording, rows: npt.NDArray[np.bool_]) -> Iterator[Counts]:
    """The samples `rows` in windows of equal length, short enough for ages that mean something."""
    samples, all_pages = recording.samples[rows], recording.resolved.page[rows]
    # A period beyond a day of cycles is damage, which must not make every rate infinite.
    period = float(np.clip(samples["period"], 1, _MAX_PERIOD).mean()) if len(samples) else 1.0
    edges = np.linspace(recording.begin_s, recording.end_s, _WINDOWS + 1)
    cuts = np.searchsorted(samples["time"] / 1e9, edges[1:-1])
    for i, part in enumerate(np.split(all_pages, cuts)):
        pages, counts = np.unique(part, return_counts=True)
        begin_s, end_s = float(edges[i]), float(edges[i + 1])
        yield Counts(Rung.PERF, begin_s, end_s, pages.astype(np.int32), counts.astype(np.uint32), period)


def _table_rows(model: RecordedModel, rates: Table, counts: Table) -> Iterator[HeatRow]:
    columns = (counts.nbytes, counts.pages, counts.known, counts.touched, counts.observed, rates.mean_rate, rates.age_s)
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    for i, (nbytes, pages, known, touched, observed, rate, age_s) in enumerate(numbers):
        key = counts.keys[i]
        part = "" if counts.by == "model" else str(key) if isinstance(key, Expert) else key
        rungs = tuple(rung.name.lower() for rung in counts.rungs_of(i))
        yield HeatRow(model.name, part, None, nbytes, pages, touched, known - touched, pages - known, observed,
                      _known(rate), _known(age_s), rungs)  # fmt: skip


def _page_rows(model: RecordedModel, columns: HeatColumns, states: HeatColumns) -> Iterator[HeatRow]:
    layers = np.repeat([segment.layer for segment in model.manifest.segments], np.diff(model.first_page)).tolist()
    names = [(rung.name.lower(),) if rung else () for rung in Rung]
    numbers = zip(
        layers, states.known.tolist(), states.observed.tolist(), columns.rate.tolist(), columns.age_s.tolist(),
        columns.rung.tolist(), strict=True,
    )  # fmt: skip
    for page, (layer, known, observed, rate, age_s, rung) in enumerate(numbers):
        touched = int(observed > 0)
        yield HeatRow(model.name, layer, page, PAGE_BYTES, 1, touched, int(known) - touched, 1 - int(known), observed,
                      _known(rate), _known(age_s), names[rung])  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def file_heat(data: PerfData, by_page: bool = False) -> list[FileRow]:
    """Samples of a perf.data file by mapped file, or by 2 MiB page of each; the most often sampled first."""
    mapped = MappedPages(data)
    keys, counts = np.unique(np.column_stack((mapped.file, mapped.page)), axis=0, return_counts=True)
    total = len(mapped.file)
    if by_page:
        found = zip(keys.tolist(), counts.tolist(), strict=True)
        rows = [FileRow(mapped.files[file], page, 1, count, count / total) for (file, page), count in found]
    else:
        pages = np.bincount(keys[:, 0].astype(np.intp), minlength=len(mapped.files)).tolist()
        samples = np.bincount(mapped.file, minlength=len(mapped.files)).tolist()
        found_files = zip(mapped.files, pages, samples, strict=True)
        rows = [FileRow(name, None, pages, count, count / total) for name, pages, count in found_files if count]
    return sorted(rows, key=lambda row: (-row.samples, row.file, row.page or 0))
