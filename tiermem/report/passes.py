"""Passes: in which order each process touched the layers of a model, and whether that is the checkpoint's.

A model that computes token by token touches its layers in one order, over and over: embeddings, layers by number, head.
(Some files hold layer 10 before layer 2, because they sort names as text; the order meant is that of numbers.) Samples
tell the order of layers exactly; windows of touched bits only from window to window, so within one the order that fits
best is taken, and a window that holds half of the layers or more tells nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tiermem.checkpoint.layers import EMBEDDINGS, HEAD
from tiermem.recording import Recording
from tiermem.report.places import Places

IN_ORDER = "in checkpoint order (cyclic)"
WITH_GAPS = "in checkpoint order, with gaps"
NO_ORDER = "in no fixed order"
TOO_LITTLE = "too little was seen to tell"

_MIN_LAYERS = 3
_MIN_FORWARD = 0.95
"""Part of the steps that must lead forward. By chance it would be half of them."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One run through the layers: those that were touched, in the order of their first touch."""

    begin_s: float
    end_s: float
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Order:
    """How one process went through one model. `layers`: how many it touched at all; `complete`: passes that touched
    every one of them; `forward`: part of the steps from layer to layer that led on by less than half a cycle."""

    pid: int
    comm: str
    model: str
    layers: int
    steps: int
    forward: float
    complete: int
    verdict: str
    passes: tuple[Pass, ...]


_Visit = tuple[float, int]
"""When, and which layer: its place in the order of `_ordered`."""


def orders(recording: Recording) -> list[Order]:
    """Of each process and model that it touched, by process: from its samples where there are any, else from its
    windows."""
    visits = _visits_of_windows(recording) | _visits_of_samples(recording)
    return [
        _order(recording, pid, model, merged)
        for (pid, model), found in sorted(visits.items())
        if (merged := list(_merged(found)))
    ]


def _visits_of_samples(recording: Recording) -> dict[tuple[int, int], list[_Visit]]:
    places, samples = Places(recording), recording.samples
    visits: dict[tuple[int, int], list[_Visit]] = {}
    ours = np.flatnonzero(places.layer >= 0)
    keys = np.column_stack((samples["pid"][ours].astype(np.int64), places.model[ours]))
    for pid, model in np.unique(keys, axis=0).tolist():
        rows = ours[(keys == (pid, model)).all(axis=1)]
        layers = _rank(recording, model)[places.layer[rows]]
        change = np.flatnonzero(np.diff(layers, prepend=-1))  # only where the layer changes: samples are many
        times = samples["time"][rows[change]] / 1e9
        visits[pid, model] = list(zip(times.tolist(), layers[change].tolist(), strict=True))
    return visits


def _visits_of_windows(recording: Recording) -> dict[tuple[int, int], list[_Visit]]:
    visits: defaultdict[tuple[int, int], list[_Visit]] = defaultdict(list)
    ranks = [_rank(recording, number) for number in range(len(recording.models))]
    for window in sorted(recording.windows, key=lambda window: window.bits.begin_s):
        first_page = recording.models[window.model].first_page
        touched = window.bits.pages[window.bits.touched]
        layers = np.unique(ranks[window.model][np.searchsorted(first_page, touched, "right") - 1]).tolist()
        count = len(first_page) - 1
        known = visits[window.pid, window.model]
        if 0 < len(layers) * 2 < count:
            last = known[-1][1] if known else layers[0]
            layers.sort(key=lambda layer: (layer - last) % count)
            known += [(window.bits.begin_s, layer) for layer in layers]
    return dict(visits)


def _ordered(recording: Recording, model: int) -> list[str]:
    """Layers of a model in the order in which it computes."""

    def key(layer: str) -> tuple[int, list[tuple[int, int, str]]]:
        words = re.split(r"([0-9]+)", layer)  # every second one is a number; of those the longer is the greater
        numbered = [(i % 2, len(word.lstrip("0")) * (i % 2), word) for i, word in enumerate(words)]
        return {EMBEDDINGS: 0, HEAD: 2}.get(layer, 1), numbered

    return sorted((segment.layer for segment in recording.models[model].manifest.segments), key=key)


def _rank(recording: Recording, model: int) -> npt.NDArray[np.intp]:
    """Place in that order of each segment."""
    place = {layer: i for i, layer in enumerate(_ordered(recording, model))}
    return np.array([place[segment.layer] for segment in recording.models[model].manifest.segments], np.intp)


def _merged(visits: Iterable[_Visit]) -> Iterator[_Visit]:
    last = -1
    for time_s, layer in visits:
        if layer != last:
            yield time_s, layer
        last = layer


def _order(recording: Recording, pid: int, model: int, visits: list[_Visit]) -> Order:
    touched = sorted({layer for _, layer in visits})
    rank = {layer: i for i, layer in enumerate(touched)}
    count, ranks = len(touched), [rank[layer] for _, layer in visits]
    steps = [(after - before) % count for before, after in pairwise(ranks)]
    # In a cycle of two every step leads on, which is why fewer than _MIN_LAYERS tell nothing.
    forward = sum(step * 2 <= count for step in steps) / len(steps) if steps else 1.0
    names = _ordered(recording, model)
    passes = [Pass(run[0][0], run[-1][0], tuple(names[layer] for _, layer in run)) for run in _runs(visits)]
    complete = sum(len(part.layers) == count for part in passes)
    # The first and the last pass may have begun before, and may go on after what was recorded.
    inner = passes[1:-1] or passes
    if count < _MIN_LAYERS or len(steps) < count:
        verdict = TOO_LITTLE
    elif forward < _MIN_FORWARD:
        verdict = NO_ORDER
    else:
        verdict = IN_ORDER if all(len(part.layers) == count for part in inner) else WITH_GAPS
    return Order(pid, recording.comm(pid, pid), recording.models[model].name, count, len(steps), forward, complete,
                 verdict, tuple(passes))  # fmt: skip


def _runs(visits: list[_Visit]) -> Iterator[list[_Visit]]:
    """Visits cut wherever they fall back to an earlier layer."""
    run: list[_Visit] = []
    for visit in visits:
        if run and visit[1] <= run[-1][1]:
            yield run
            run = []
        run.append(visit)
    yield run
