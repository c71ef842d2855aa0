"""Recorded traces: what becomes of a recording of a pool. Invents nothing: what was not seen was not touched here.

A window of touched bits is a visit at its end, of the pages that were touched; samples are visits of 10 ms, of the
pages that were hit. So a trace knows of a page at most one touch a window, and none of pages that had no turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiermem.errors import RecordingError
from tiermem.page_facts import page_facts_of
from tiermem.recording import Recording, read
from tiermem.replay.trace import Builder, Trace

_VISIT_S = 0.01
"""Samples of a model within so long are one visit."""


def trace_of(path: str | Path) -> Trace:
    """The trace of a recording's file. Raises RecordingError for a file that is none, or in which nothing was seen;
    OSError."""
    recording = read(path)
    builder = Builder()
    firsts = []
    for model in recording.models:
        facts = page_facts_of(model.manifest)
        firsts.append(builder.pages)
        builder.add_model(model.name, facts.segment, facts.order, facts.tensor_class)
    begin_s, end_s = recording.begin_s, recording.end_s
    seen = 0
    for at_s, model_number, pages in (*_windows(recording), *_samples(recording)):
        at = np.array([min(max(at_s, begin_s), end_s) - begin_s])
        builder.add_visits(at, np.array([len(pages)]), pages + firsts[model_number])
        seen += len(pages)
    if not seen:
        raise RecordingError(f"{path}: no touch of a model was recorded; record while models are in use")
    for model_number, open_s, release_s in _uses(recording):
        builder.add_use(model_number, open_s - begin_s, release_s - begin_s)
    notes = (*recording.notes, "a page that was not seen touched in the recording counts as untouched")
    return builder.finish({"kind": "recording"}, max(end_s - begin_s, 1e-3), notes=notes)


_Visit = tuple[float, int, npt.NDArray[np.int32]]


def _windows(recording: Recording) -> Iterator[_Visit]:
    for window in recording.windows:
        bits = window.bits
        if bits.touched.any():
            yield bits.end_s, window.model, bits.pages[bits.touched]


def _samples(recording: Recording) -> Iterator[_Visit]:
    if not len(recording.samples):
        return
    resolved = recording.resolved
    known = resolved.model >= 0
    slot = (recording.samples["time"][known] / (_VISIT_S * 1e9)).astype(np.int64)
    rows = np.unique(np.stack((slot, resolved.model[known], resolved.page[known])), axis=1)
    for visit in np.split(rows, np.flatnonzero(np.diff(rows[0]) | np.diff(rows[1])) + 1, axis=1):
        if visit.shape[1]:
            yield float(visit[0, 0]) * _VISIT_S, int(visit[1, 0]), visit[2].astype(np.int32)


def _uses(recording: Recording) -> Iterator[tuple[int, float, float]]:
    """(model, opened, released) of each lease."""
    numbers = {model.id: number for number, model in enumerate(recording.models)}
    held: dict[tuple[int, str], tuple[int, float]] = {}
    for fields in recording.opens:
        lease = (fields["pid"], fields["lease"])
        if fields["kind"] == "open" and fields["model"] in numbers:
            held[lease] = (numbers[fields["model"]], fields["time_s"])
        elif lease in held:
            yield (*held.pop(lease), fields["time_s"])
    for model, open_s in held.values():
        yield model, open_s, recording.end_s
