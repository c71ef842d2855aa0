"""Plots: heat over time as a picture, one band of pages a model or mapped file. Knows matplotlib, but no window system.

What nobody looked at is drawn apart from what is cold: hatched grey, against the darkest colour of the scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiermem.errors import ConfigError
from tiermem.observations import Rung
from tiermem.perfdata import PerfData
from tiermem.recording import Recording
from tiermem.report.mappings import MappedPages

COLUMNS, ROWS = 240, 400
MAX_BANDS = 8
_MAX_LABELS = 32

Grid = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Band:
    """One picture. `values`: float64 (rows of pages, first page at the top; columns of time), NaN where unknown;
    `labels`: (row where it begins, text). `measure` says what a value is."""

    title: str
    values: Grid
    labels: tuple[tuple[float, str], ...]
    seconds: float
    measure: str


TOUCHED = "part of the sampled windows in which it was touched"
SAMPLES = "samples"


def bands(source: Recording | PerfData) -> list[Band]:
    """What there is to draw, at most MAX_BANDS: the models, or the mapped files that were sampled most often."""
    if isinstance(source, PerfData):
        return _file_bands(source)
    drawn = [_model_band(source, number) for number in range(len(source.models))]
    return [band for band in drawn if not np.isnan(band.values).all()][:MAX_BANDS]


def _model_band(recording: Recording, number: int) -> Band:
    model = recording.models[number]
    rows = min(model.pages, ROWS)
    begin_s, seconds = recording.begin_s, max(recording.end_s - recording.begin_s, 1e-9)
    scale = COLUMNS / seconds
    labels = tuple(
        (first * rows / model.pages, segment.layer)
        for first, segment in zip(model.first_page, model.manifest.segments, strict=False)
    )
    mine = recording.resolved.model == number
    if mine.any():
        times = recording.samples["time"][mine] / 1e9
        values = _count(recording.resolved.page[mine] * rows // model.pages, (times - begin_s) * scale, rows)
        if not any(event.rung is Rung.PERF for event in recording.events):
            values[values == 0] = np.nan  # only PERF watches every page, so that none means cold
        return Band(model.name, values, labels, seconds, SAMPLES)
    sampled, touched = np.zeros((rows, COLUMNS)), np.zeros((rows, COLUMNS))
    for window in recording.windows:
        if window.model == number:
            row = window.bits.pages.astype(np.int64) * rows // model.pages
            first, last = (
                int(np.clip((at - begin_s) * scale, 0, COLUMNS - 1)) for at in (window.bits.begin_s, window.bits.end_s)
            )
            sampled[:, first : last + 1] += np.bincount(row, minlength=rows)[:, None]
            touched[:, first : last + 1] += np.bincount(row[window.bits.touched], minlength=rows)[:, None]
    values = np.divide(touched, sampled, out=np.full_like(touched, np.nan), where=sampled > 0)
    return Band(model.name, values, labels, seconds, TOUCHED)


def _file_bands(data: PerfData) -> list[Band]:
    mapped, drawn = MappedPages(data), []
    times = data.samples["time"] / 1e9
    if not len(times):
        return []
    begin_s, seconds = float(times.min()), max(float(np.ptp(times)), 1e-9)
    counts = np.bincount(mapped.file, minlength=len(mapped.files))
    for number in np.argsort(-counts, kind="stable")[:MAX_BANDS].tolist():
        mine = mapped.file == number
        if not mine.any():
            break
        pages, place = np.unique(mapped.page[mine], return_inverse=True)  # seen ones alone: address spaces are empty
        rows = min(len(pages), ROWS)
        values = _count(place * rows // len(pages), (times[mine] - begin_s) * COLUMNS / seconds, rows)
        values[values == 0] = np.nan
        ticks = np.unique(np.linspace(0, len(pages) - 1, min(len(pages), 6)).astype(int))
        labels = tuple((int(i) * rows / len(pages), f"page {pages[i]}") for i in ticks)
        drawn.append(Band(mapped.files[number], values, labels, seconds, SAMPLES))
    return drawn


def _count(row: npt.NDArray[np.integer], column: npt.NDArray[np.float64], rows: int) -> Grid:
    place = row.astype(np.int64) * COLUMNS + np.clip(column, 0, COLUMNS - 1).astype(np.int64)
    return np.bincount(place, minlength=rows * COLUMNS).reshape(rows, COLUMNS).astype(np.float64)


def draw(source: Recording | PerfData, path: Path) -> int:
    """Write the picture as a PNG file; returns how many bands it has.

    Raises ConfigError without matplotlib or where nothing was observed, OSError where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'tiermem[report]'") from None
    drawn = bands(source)
    if not drawn:
        raise ConfigError("nothing was observed, so there is nothing to draw; record while a model is in use")
    figure = Figure(figsize=(11, 1.2 + 3.6 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, band in zip(np.atleast_1d(figure.subplots(len(drawn), 1)), drawn, strict=True):
        _draw_band(figure, axes, band)
    figure.savefig(path, format="png", dpi=100)
    return len(drawn)


def _draw_band(figure: Any, axes: Any, band: Band) -> None:
    rows = len(band.values)
    axes.set_facecolor("0.85")
    axes.patch.set_hatch("////")
    axes.patch.set_edgecolor("0.65")
    shown = np.ma.masked_invalid(band.values)
    limit = 1.0 if band.measure == TOUCHED else float(shown.max())
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", vmin=0, vmax=max(limit, 1e-9),
                        extent=(0, band.seconds, rows, 0))  # fmt: skip
    figure.colorbar(image, ax=axes, label=band.measure)
    step = -(-len(band.labels) // _MAX_LABELS)
    labels = band.labels[:: max(step, 1)]
    axes.set_yticks([row for row, _ in labels], [_short(text, 40) for _, text in labels], fontsize=7, va="top")
    # Names are data: a dollar sign in one is no formula.
    for text in (axes.set_title(f"{_short(band.title, 100)} (hatched: unknown)"), *axes.get_yticklabels()):
        text.set_parse_math(False)
    axes.set_xlabel("seconds")


def _short(text: str, length: int) -> str:
    """The end of a name, which tells more than its beginning; too long a label would leave no room for the picture."""
    return text if len(text) <= length else f"...{text[-length:]}"
