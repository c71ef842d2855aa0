"""Plot: hit ratios of a comparison over time, as a picture. Knows matplotlib, but no window system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tiermem.errors import ConfigError
from tiermem.replay.result import Result
from tiermem.replay.trace import Trace
from tiermem.types import PAGE_BYTES

POINTS = 240
"""Of each curve, at most; a point is the mean of some whole seconds."""


def draw(trace: Trace, results: Sequence[Result], path: Path) -> None:
    """Write a PNG file: above the part of the reads that the fastest tier served, below what was moved.

    Raises ConfigError without matplotlib, OSError where the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install 'tiermem[report]'") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    hits, moves = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width_s = np.ceil(trace.end_s / POINTS)
    edges = np.arange(0, trace.end_s + width_s, width_s)
    for result in results:
        if not result.ticks:  # a baseline
            hits.axhline(result.hit_ratio, linestyle="--", color="0.4")
            hits.annotate(result.policy, (trace.end_s, result.hit_ratio), fontsize=7, va="bottom", ha="right")
            continue
        ticks = result.timeline
        assert ticks is not None, "whoever was asked has a timeline"
        read, hit, moved = (np.histogram(ticks.begin_s, edges, weights=column)[0]
                            for column in (ticks.reads, ticks.hits, ticks.moved))  # fmt: skip
        with np.errstate(invalid="ignore"):
            line = hits.plot(edges[:-1], hit / read, label=result.policy)[0]  # no reads: no point
        moves.plot(edges[:-1], moved * PAGE_BYTES / width_s / 2**30, color=line.get_color())
    for shift_s in trace.shifts_s:
        for axes in (hits, moves):
            axes.axvline(shift_s, color="0.6", linestyle=":")
    hits.set_ylabel("part of the bytes read from the fastest tier")
    hits.set_ylim(0, 1.02)
    hits.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    for text in hits.get_legend().get_texts():
        text.set_parse_math(False)  # paths are data
    moves.set_ylabel("moved, GiB/s")
    moves.set_xlabel("seconds of simulated time")
    figure.savefig(path, format="png", dpi=100)
