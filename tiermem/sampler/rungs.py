"""The ladder of rungs: by which means pages can be seen here, best first, found by trying each.

Owns the trial of each rung, and the words for a refusal. Keeps nothing open, and changes nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tiermem import samples
from tiermem._native import Event, Pagemap, Ring
from tiermem.errors import ConfigError, NativeError, TiermemError
from tiermem.host import CAP_PERFMON, CAP_SYS_ADMIN, ROOT, has_capability
from tiermem.observations import Rung
from tiermem.sampler import events
from tiermem.sampler.events import NamedEvent, Parts
from tiermem.sampler.sources import Opener
from tiermem.sampler.sysfs import online_cpus, read

_ABSENT = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV, errno.ENXIO, errno.ENOSYS)
_RIGHTS = (errno.EACCES, errno.EPERM)
_HELD = (errno.EBUSY, errno.ENOSPC)
_RING_BYTES = 16 << 10


@dataclass(frozen=True, slots=True)
class RungState:
    """Whether a rung can be used. `reason` says with what, or why not and what to do. `events`, of the rung *perf*
    alone, are what to give to PerfSampler; `whole_host` tells its two forms apart."""

    rung: Rung
    available: bool
    reason: str
    events: Parts = ()
    whole_host: bool = False

    @property
    def name(self) -> str:
        form = "" if self.rung is not Rung.PERF else " (whole host)" if self.whole_host else " (own processes)"
        return f"{self.rung.name.lower()}{form}"


def ladder(root: Path = ROOT, opener: Opener = Ring) -> tuple[RungState, ...]:
    """Every rung, best first. Opens, and closes, one ring for each form of sampling; takes milliseconds."""
    return (
        _perf(root, opener, whole_host=True),
        _perf(root, opener, whole_host=False),
        _present(),
        _accessed(root),
        RungState(Rung.DECLARED, True, "what readers ask for; no access is observed"),
    )


def choose(wanted: str, root: Path = ROOT, opener: Opener = Ring) -> RungState:
    """The best rung of that name: `perf`, `present`, `accessed`, `declared`; of any for `auto`, none for `off`.

    Raises ConfigError with the reason where it cannot be used here.
    """
    if wanted == "off":
        return RungState(Rung.NONE, True, "sampling is off")
    names = [rung.name.lower() for rung in sorted(Rung, reverse=True) if rung is not Rung.NONE]
    if wanted not in ("auto", *names):
        raise ConfigError(f"no sampler is called {wanted!r}; use auto, {', '.join(names)} or off")
    states = [state for state in ladder(root, opener) if wanted in ("auto", state.rung.name.lower())]
    for state in states:
        if state.available:
            return state
    reasons = dict.fromkeys(f"{state.name}: {state.reason}" for state in states)
    raise ConfigError(f"pages cannot be sampled by {wanted} here; {'; '.join(reasons)}")


def _perf(root: Path, opener: Opener, *, whole_host: bool) -> RungState:
    """The first of the host's events that opens; else the words for why the first one did not."""
    try:
        found = list(events.hardware(root).values()) or [events.builtin()]
    except ConfigError as problem:
        return RungState(Rung.PERF, False, f"the kernel's description of its PMU: {problem}", whole_host=whole_host)
    refusals = []
    for parts in found:
        if not parts or (parts[0].whole_host_only and not whole_host):
            refusals.append(
                f"{parts[0].rung} follows no process before Linux 6.2" if parts else
                "no PMU: the kernel shows none that samples addresses; sampling uses page tables"
            )  # fmt: skip
            continue
        try:
            admitted = _admitted(parts, root, opener, whole_host)
        except TiermemError as problem:
            refusals.append(_refusal(parts[0], problem, root, whole_host))
            continue
        return RungState(Rung.PERF, True, f"{parts[0].rung} samples {parts[0].name}", admitted, whole_host)
    return RungState(Rung.PERF, False, refusals[0], whole_host=whole_host)


def _admitted(parts: Parts, root: Path, opener: Opener, whole_host: bool) -> Parts:
    """The event as the kernel takes it: with physical addresses if we may know them. Raises NativeError."""
    physical = tuple(_with(part, samples.PHYS_ADDR) for part in parts if not part.aux_bytes)
    if physical:
        try:
            _try(physical, root, opener, whole_host)
            return physical
        except NativeError as problem:
            if problem.errno not in (*_RIGHTS, errno.EINVAL):
                raise
    _try(parts, root, opener, whole_host)
    return parts


def _with(part: NamedEvent, columns: int) -> NamedEvent:
    return replace(part, event=replace(part.event, sample_type=part.event.sample_type | columns))


def _try(parts: Sequence[NamedEvent], root: Path, opener: Opener, whole_host: bool) -> None:
    online = online_cpus(root)
    for part in parts:
        cpus = [cpu for cpu in part.cpus or online if cpu in online]
        if whole_host and not cpus:
            continue
        pid, cpu = (-1, cpus[0]) if whole_host else (0, -1)
        if part.leader is None:
            _open(opener, part, part.event, pid, cpu, None)
            continue
        with closing(opener(replace(part.leader, disabled=True), pid, cpu, nbytes=_RING_BYTES)) as leader:
            _open(opener, part, part.event, pid, cpu, leader)


def _open(opener: Opener, part: NamedEvent, event: Event, pid: int, cpu: int, leader: Ring | None) -> None:
    disabled = replace(event, disabled=True)
    opener(disabled, pid, cpu, leader=leader, nbytes=_RING_BYTES, aux_nbytes=part.aux_bytes).close()


def _refusal(part: NamedEvent, problem: TiermemError, root: Path, whole_host: bool) -> str:
    number = problem.errno or 0 if isinstance(problem, NativeError) else 0
    code = "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(problem))
    if number in _ABSENT:
        return f"no PMU: perf_event_open of {part.name} says {code}; sampling uses page tables"
    if number in _HELD:
        return f"another user holds the PMU: perf_event_open of {part.name} says {code}; end perf, VTune or the like"
    if number not in _RIGHTS:
        return f"perf_event_open of {part.name} says {code}"
    allowed = 0 if whole_host else 2 if part.event.exclude_kernel else 1
    level = read(root, "proc/sys/kernel/perf_event_paranoid") or "unknown"
    if any(has_capability(root, bit) for bit in (CAP_PERFMON, CAP_SYS_ADMIN)):
        return f"perf_event_open of {part.name} says {code} in spite of our rights; a security module may forbid it"
    return f"no CAP_PERFMON; grant it, or set sysctl kernel.perf_event_paranoid={allowed} (is {level})"


def _present() -> RungState:
    try:
        pagemap = Pagemap()
    except NativeError as problem:
        return RungState(Rung.PRESENT, False, str(problem))
    with closing(pagemap):
        means = "PAGEMAP_SCAN" if pagemap.scans else "/proc/self/pagemap (PAGEMAP_SCAN needs Linux 6.7)"
    return RungState(Rung.PRESENT, True, f"clients unmap pages and look which come back: {means}")


def _accessed(root: Path) -> RungState:
    path = root / "proc/self/clear_refs"
    if not path.exists():
        return RungState(Rung.ACCESSED, False, "the kernel has no clear_refs; use one with CONFIG_PROC_PAGE_MONITOR")
    if not os.access(path, os.W_OK):
        return RungState(Rung.ACCESSED, False, "/proc/self/clear_refs is not writable; mount /proc for writing")
    return RungState(Rung.ACCESSED, True, "clear_refs and smaps; not on hugetlb segments")
