"""Events that sample data addresses: Intel PEBS, AMD IBS, Arm SPE as /sys shows them, and the kernel's own page faults.

Owns the choice of configuration, period and columns. Never opens one: what the kernel admits, the ladder finds.
Encodings are those of the kernel's sysfs, and of Intel's event tables (MEM_INST_RETIRED.ALL_LOADS 0x81d0,
MEM_LOAD_RETIRED.L3_MISS 0x20d1) where it names none.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from tiermem import samples
from tiermem._native import Event
from tiermem.host import ROOT, kernel_version
from tiermem.sampler.sysfs import Pmu, unit, units

PERF_TYPE_SOFTWARE, PERF_TYPE_RAW, PERF_TYPE_BREAKPOINT = 1, 4, 5
PAGE_FAULTS_MIN, PAGE_FAULTS_MAJ = 5, 6  # perf_sw_ids
HW_BREAKPOINT_RW = 3

ALL_LOADS, L3_MISS = 0x81D0, 0x20D1
_LOAD_LATENCY, _LEAST_LATENCY = 0x01CD, 3  # the least that the hardware admits
_BASE = samples.IP | samples.TID | samples.TIME | samples.ADDR | samples.CPU | samples.PERIOD
_FAULT = _BASE | samples.DATA_PAGE_SIZE
_AUX_BYTES = 128 << 10  # 32 OS pages: more of them did not lower the loss on Arm (arXiv 2410.01514)


@dataclass(frozen=True, slots=True)
class NamedEvent:
    """An event to sample, and how. `rung` says by which means; `period_step` is what its period must be a multiple of,
    and 0 where each occurrence counts; `user_only`: the hardware samples the kernel too, whose samples are dropped.

    `leader` counts in the same group and must be opened first. `aux_bytes`: size of the area that takes its records, 0
    where they go to the ring. `cpus`: None where all CPUs have it.
    """

    name: str
    rung: str
    event: Event
    leader: Event | None = None
    aux_bytes: int = 0
    whole_host_only: bool = False
    note: str = ""
    cpus: tuple[int, ...] | None = None
    period_step: int = 0
    user_only: bool = False

    def nth(self, ring: int) -> Event:
        """The event for ring number `ring`: each has its own period, a prime multiple of the step near the wanted one,
        so that no two CPUs sample in step and none in step with a loop."""
        if not self.period_step:
            return self.event
        return replace(self.event, period=_primes(self.event.period // self.period_step, ring) * self.period_step)

    def every(self, period: int) -> NamedEvent:
        """The same event, sampled about every `period` occurrences."""
        return replace(self, event=replace(self.event, period=max(period, self.period_step, 1)))


Parts = tuple[NamedEvent, ...]
"""One event; of several parts where CPUs of different kinds encode it differently, each with its own `cpus`."""


def hardware(root: Path = ROOT) -> Mapping[str, Parts]:
    """Events of this host's CPUs by name, the most useful one for weights first; empty where it has none. Raises
    ConfigError where the kernel describes a unit in a way that we do not understand."""
    weight = samples.WEIGHT_STRUCT if kernel_version(root) >= (5, 12) else samples.WEIGHT
    columns = _BASE | samples.DATA_SRC | weight
    intel = [_pebs(pmu, columns) for pmu in units(root, r"cpu|cpu_core|cpu_atom")]
    found = [event for events in intel for event in events]
    ibs = unit(root, "ibs_op")
    if ibs is not None:
        found += _ibs(ibs, columns, kernel_version(root) >= (6, 2))
    found += [_spe(pmu) for pmu in units(root, r"arm_spe_\d+")]
    names = dict.fromkeys(event.name for event in found)
    return {name: tuple(event for event in found if event.name == name) for name in names}


def builtin() -> Parts:
    """What to try where /sys names nothing: Intel's load latency by its number. Empty on other CPUs, where that number
    may mean something else."""
    if platform.machine() != "x86_64":
        return ()
    event = Event(PERF_TYPE_RAW, _LOAD_LATENCY, config1=_LEAST_LATENCY, period=100_003,
                  sample_type=_BASE | samples.DATA_SRC, precise=2)  # fmt: skip
    return (NamedEvent("mem-loads", "Intel PEBS", event, period_step=1),)


def faults(*, kernel: bool = False) -> Parts:
    """Page faults, minor and major: the address of each first touch of an OS page, after it was mapped. `kernel`: also
    those of system calls, which needs a right."""
    common = Event(PERF_TYPE_SOFTWARE, PAGE_FAULTS_MIN, sample_type=_FAULT, exclude_kernel=not kernel, monotonic=True)
    note = "first touches only: a page that stays mapped is not seen again"
    return tuple(
        NamedEvent(name, "software", replace(common, config=config), note=note)
        for name, config in (("faults-min", PAGE_FAULTS_MIN), ("faults-maj", PAGE_FAULTS_MAJ))
    )


def watchpoint(address: int, length: int = 8) -> NamedEvent:
    """Every access to `length` (1, 2, 4 or 8) aligned bytes, by the debug registers; four at most at a time."""
    event = Event(PERF_TYPE_BREAKPOINT, 0, config1=address, config2=length, sample_type=_BASE,
                  breakpoint_type=HW_BREAKPOINT_RW, monotonic=True)  # fmt: skip
    return NamedEvent("watchpoint", "debug registers", event)


def _pebs(pmu: Pmu, columns: int) -> list[NamedEvent]:
    """Events of an Intel core unit; none where it cannot sample addresses."""
    loads = pmu.event("mem-loads")
    precise = min(2, pmu.cap("max_precise", missing=2))  # 3 is for few events, 2 has no skid
    if not loads or not precise:
        return []
    common = Event(pmu.type, 0, sample_type=columns, precise=precise)
    aux = pmu.event("mem-loads-aux")
    # Some cores refuse latencies with a data source (ENODATA) unless this event leads the group.
    leader = _configured(replace(common, period=0, sample_type=0, precise=0), pmu, aux) if aux else None
    least = {"ldlat": _LEAST_LATENCY} if pmu.has_term("ldlat") else {}
    latency = _configured(replace(common, period=100_003), pmu, loads | least)
    found = [
        NamedEvent("all-loads", "Intel PEBS", replace(common, config=ALL_LOADS, period=1_000_003), cpus=pmu.cpus,
                   period_step=1, note="retired loads, prefetched or not: the event for weights that are streamed"),
        NamedEvent("mem-loads", "Intel PEBS", latency, leader, cpus=pmu.cpus, period_step=1,
                   note="loads with their latency" + (", in a group with mem-loads-aux" if leader else "")),
    ]  # fmt: skip
    if pmu.name != "cpu_atom":  # those cores count L3 misses without addresses
        misses = replace(common, config=L3_MISS, period=10_007)
        note = "demand loads that missed; prefetched reads are not seen"
        found.append(NamedEvent("l3-miss", "Intel PEBS", misses, cpus=pmu.cpus, period_step=1, note=note))
    return found


def _ibs(pmu: Pmu, columns: int, of_tasks: bool) -> list[NamedEvent]:
    """AMD's sampler of micro-operations. Before Linux 6.2 it follows no task (`of_tasks`); it samples the kernel too
    unless that is filtered in software (term swfilt)."""
    filtered = pmu.has_term("swfilt")
    terms = ({"cnt_ctl": 1} if pmu.has_term("cnt_ctl") else {}) | ({"swfilt": 1} if filtered else {})
    # The counter's 16 high bits are the period; its low 4 are random, which is the jitter.
    event = Event(pmu.type, 0, period=0x4000 * 16, sample_type=columns, exclude_kernel=filtered)
    common = NamedEvent("ibs-op", "AMD IBS", _configured(event, pmu, terms), whole_host_only=not of_tasks,
                        note="all micro-operations; those without an address are dropped", period_step=16,
                        user_only=not filtered)  # fmt: skip
    if not (pmu.cap("zen4_ibs_extensions") and pmu.has_term("l3missonly")):
        return [common]
    misses = _configured(replace(event, period=0x400 * 16), pmu, terms | {"l3missonly": 1})
    note = "operations that missed L3; prefetched reads are not seen"
    return [common, replace(common, name="ibs-l3miss", event=misses, note=note)]


def _spe(pmu: Pmu) -> NamedEvent:
    """Arm's statistical profiling: its records go to an AUX area, their times are ticks of the core's timer."""
    wanted = {"ts_enable": 1, "load_filter": 1, "jitter": 1}
    known = {term: value for term, value in wanted.items() if pmu.has_term(term)}
    step = 256  # the interval's low 8 bits are the hardware's jitter
    period = max(256 * step, pmu.cap("min_interval"))
    event = _configured(Event(pmu.type, 0, period=period, sample_type=_BASE), pmu, known)
    return NamedEvent("spe-loads", "Arm SPE", event, aux_bytes=_AUX_BYTES, cpus=pmu.cpus, period_step=step,
                      note="sampled loads; their time is that of the poll that took them")  # fmt: skip


def _configured(event: Event, pmu: Pmu, terms: Mapping[str, int]) -> Event:
    words = pmu.encode(terms)
    config, config1, config2, config3 = (words.get(name, 0) for name in ("config", "config1", "config2", "config3"))
    return replace(event, config=config, config1=config1, config2=config2, config3=config3)


@cache
def _primes(least: int, number: int) -> int:
    """The `number`th prime from `least` on."""
    candidate = max(least, 2) if not number else _primes(least, number - 1) + 1
    while any(candidate % divisor == 0 for divisor in range(2, int(candidate**0.5) + 1)):
        candidate += 1
    return candidate
