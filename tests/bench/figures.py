"""Figures: what the results of the cases come to, each beside its target. Measures nothing and prints nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.bench.cases import COPYING_PROCESSES, DIRECT, NO_SPARE, PROCESSES, Result, Results
from tests.bench.loaders import LOADERS, OURS
from tests.bench.subject import Subject
from tiermem.bench.samples import Samples

Unit = Literal["s", "B", "B/s", "x"]

FIRST_LOAD_S, LATER_LOAD_S = 15e-3, 5e-3
TOUCH_FLOORS, TOUCH_GAIN = 1.5, 2.0
OF_DEVICE_LIMIT = 0.9
PRIVATE_PART = 0.01
COPIES_IN_ALL = 1.02
STAGING_BYTES = 64 << 20
PEER = "safetensors"


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `target` bounds the median from above, or from below where `at_least`; None: for comparison."""

    what: str
    samples: Samples
    unit: Unit
    target: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.samples.median >= self.target if self.at_least else self.samples.median <= self.target


def _row(
    what: str, values: Iterable[float], unit: Unit, target: float | None = None, at_least: bool = False, note: str = ""
) -> Row:
    return Row(what, Samples.of(list(values)), unit, target, at_least, note)


def opening(results: Results) -> list[Row]:
    """a: until every tensor of a resident model is there."""
    rows = []
    for name, runs in results.items():
        ours = name == OURS
        note = "copies the model" if LOADERS[name].copies else "page cache warm" if not ours else "resident"
        firsts = (run["load_s"] for run in runs)
        rows.append(_row(f"{name}, first load", firsts, "s", FIRST_LOAD_S if ours else None, note=note))
        later = [value for run in runs for value in run.get("later_s", ())]
        if later:
            rows.append(_row(f"{name}, later loads", later, "s", LATER_LOAD_S if ours else None, note=note))
    for name, runs in results.items():
        rows.append(_row(f"{name}, imports", (run["import_s"] for run in runs), "s", note="beside torch's"))
    torch = [run["import_torch_s"] for runs in results.values() for run in runs]
    return [*rows, _row("torch, import", torch, "s", note="all loaders need it")]


def touching(results: Results) -> list[Row]:
    """b: until one byte of every 4 KiB was read as well."""
    rows = []
    floors = [run["touch_again_s"] for run in results[OURS]]
    target = TOUCH_FLOORS * Samples.of(floors).median
    for name, runs in results.items():
        totals = (run["load_s"] + run["touch_s"] for run in runs)
        rows.append(_row(f"{name}, load and touch", totals, "s", target if name == OURS else None))
    rows.append(_row(f"{OURS}, touch alone", (run["touch_s"] for run in results[OURS]), "s"))
    rows.append(_row("floor: touch when mapped", floors, "s", note=f"in {OURS}'s runs"))
    if results.get(PEER):
        gains = _ratios(_totals(results[PEER]), _totals(results[OURS]))
        rows.append(_row(f"{PEER} / {OURS}", gains, "x", TOUCH_GAIN, at_least=True, note="run by run"))
    # Where others take the processors away, only the time on them is still the loader's own.
    for name, runs in results.items():
        spent = (run["load_cpu_s"] + run["touch_cpu_s"] for run in runs)
        rows.append(_row(f"{name}, CPU time", spent, "s", note="load and touch, this process"))
    spent = (run["touch_again_cpu_s"] for run in results[OURS])
    return [*rows, _row("floor, CPU time", spent, "s")]


def reading(results: Results, subject: Subject) -> list[Row]:
    """c: from files that are on disk only until every tensor is there."""
    limits = [run["bytes"] / run["read_s"] for run in results[DIRECT]]
    target = OF_DEVICE_LIMIT * Samples.of(limits).median
    rows = [_row("device limit", limits, "B/s", note="O_DIRECT, 4 threads x 1 MiB, no digests")]
    for name in (OURS, NO_SPARE):
        rates = (subject.nbytes / run["load_s"] for run in results[name])
        note = "digests included" + (", spare memory full" if name == OURS else "")
        rows.append(_row(f"{name}, load", rates, "B/s", target if name == OURS else None, name == OURS, note))
    for name, runs in results.items():
        if name != DIRECT:
            rates = (subject.nbytes / total for total in _totals(runs))
            note = "" if name in (OURS, NO_SPARE) else "no digests"
            rows.append(_row(f"{name}, load and touch", rates, "B/s", note=note))
    for name in (OURS, NO_SPARE):
        for work in ("prefault", "read", "digest"):
            spent = (run["figures"][f"{work}_thread_s"] for run in results[name])
            rows.append(_row(f"{name}, {work}", spent, "s", note="thread seconds"))
    filled = [run["spare_prefault_s"] for run in results[OURS]]
    rows.append(_row("spare prefault, first fill", filled[:1], "s"))
    if len(filled) > 1:
        again = (after - before for before, after in itertools.pairwise(filled))
        rows.append(_row("spare prefault, refill", again, "s", note="after each load"))
    return rows


def sharing(results: Results, subject: Subject) -> list[Row]:
    """d: what each of several processes holds for itself, and all of them together."""
    rows = []
    for name, runs in results.items():
        grown = [value for run in runs for value in run["private_growth_bytes"]]
        target = PRIVATE_PART * subject.nbytes if name == OURS else None
        processes = COPYING_PROCESSES if LOADERS[name].copies else PROCESSES
        worst = f"{max(grown) / subject.nbytes:.2%} of the model at most, {processes} processes"
        rows.append(_row(f"{name}, private", grown, "B", target, note=worst))
        if name == OURS:
            held = (run["pss_shmem_bytes"] for run in runs)
            copies = COPIES_IN_ALL * runs[0]["page_bytes"]
            rows.append(_row(f"{name}, segments in all", held, "B", copies, note="PSS, with the daemon's"))
        loads = [value for run in runs for value in run["load_s"]]
        rows.append(_row(f"{name}, load", loads, "s", note="at once with the others"))
    return rows


def staging(results: Results, subject: Subject) -> list[Row]:
    """e: memory that a cold load needs beside the model."""
    ours = results[NO_SPARE]
    rows = [
        _row(f"{OURS}, staging", (run["staging_bytes"] for run in ours), "B", STAGING_BYTES, note="as it says itself"),
        _row(f"{OURS}, daemon's peak", (run["daemon_growth_bytes"] for run in ours), "B", STAGING_BYTES,
             note="VmHWM less segments"),
    ]  # fmt: skip
    for name, runs in results.items():
        if name not in (DIRECT, OURS, NO_SPARE):
            beside = (run["peak_growth_bytes"] - subject.nbytes for run in runs)
            rows.append(_row(f"{name}, peak", beside, "B", note="VmHWM growth less the model"))
    return rows


def first_use(results: Results) -> list[Row]:
    """f: prefaulting memory."""
    runs = results["prefault"]
    found = (run["bytes"] / run["found_s"] for run in runs)
    again = (run["bytes"] / run["again_s"] for run in runs)
    return [
        _row("memory that lay idle", found, "B/s", note="a guest's host may have to back it"),
        _row("the same memory, at once", again, "B/s", note="zeroed again only"),
    ]


def _totals(runs: Sequence[Result]) -> list[float]:
    return [run["load_s"] + run["touch_s"] for run in runs]


def _ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(above, below, strict=True)]
