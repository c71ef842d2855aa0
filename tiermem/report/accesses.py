"""Accesses: samples in the order of time, with what they touched and what served them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tiermem.data_source import level
from tiermem.perfdata import PerfData
from tiermem.recording import Recording
from tiermem.report.places import Places, comm_of


@dataclass(frozen=True, slots=True)
class Access:
    """One sample. `model`, `layer` and `tensor` are empty and `page` is None where it touched none of ours; of a
    perf.data file `model` is the mapped file. `source` says what served it, `latency_cycles` in which time; empty and
    0 where the event does not tell."""

    time_s: float
    pid: int
    tid: int
    comm: str
    event: str
    address: int
    model: str
    layer: str
    tensor: str
    page: int | None
    source: str
    latency_cycles: int


def accesses(source: Recording | PerfData, limit: int | None = None, ours: bool = False) -> list[Access]:
    """The first `limit` samples (None: all) in the order of time; with `ours` only those that touched a model."""
    return list(itertools.islice(_accesses(source, ours), limit))


def _accesses(source: Recording | PerfData, ours: bool) -> Iterator[Access]:
    places, names, samples = Places(source), source.comms, source.samples
    for row in range(len(samples)):
        if ours and places.model[row] < 0:
            continue
        sample = samples[row]
        pid, tid = int(sample["pid"]), int(sample["tid"])
        model, layer, tensor = places.names(row)
        yield Access(
            int(sample["time"]) / 1e9, pid, tid, comm_of(names, pid, tid), source.events[int(sample["event"])].name,
            int(sample["addr"]), model, layer, tensor, int(places.page[row]) if places.model[row] >= 0 else None,
            level(int(sample["data_src"])), int(sample["weight"]),
        )  # fmt: skip
