"""The cases: which processes run in which order, and what they hand back. Judges nothing (figures.py does).

Within a case the loaders take turns, run by run, so that the machine's drift meets all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tests.bench import memory
from tests.bench.launch import Daemon, Worker, run_worker
from tests.bench.loaders import LOADERS, OURS
from tests.bench.subject import Subject
from tiermem.bench import page_cache
from tiermem.errors import DigestMismatch, Refused

Result = dict[str, Any]
Results = dict[str, list[Result]]
Progress = Callable[[str], None]

LATER_LOADS = 5
PROCESSES, COPYING_PROCESSES = 8, 2
"""How many processes open a model at once; fewer of the loaders that hold a copy in each."""

PREFAULT_BYTES, PREFAULT_RUNS, IDLE_S = 2 << 30, 3, 20.0

NO_SPARE, DIRECT = "tiermem, no spare", "O_DIRECT"
"""Names of results beside the loaders'."""

_HEADROOM = 1.1


@dataclass(frozen=True, slots=True)
class Run:
    """What is measured: a checkpoint, the loaders that are installed, and how often."""

    subject: Subject
    loaders: Sequence[str]
    runs: int
    say: Progress

    def turns(self, names: Iterable[str], case: str) -> Iterator[str]:
        """Each name once a run."""
        order = tuple(names)
        for number in range(self.runs):
            for name in order:
                self.say(f"{self.subject.label}: {case}, {name}, run {number + 1} of {self.runs}")
                yield name

    def load(self, loader: str, address: str, later: int = 0) -> Result:
        """One measurement in a fresh process, its bytes verified."""
        result = run_worker(self._task(loader, later), address)
        self._verify(loader, result)
        return result

    def _task(self, loader: str, later: int = 0) -> Mapping[str, object]:
        nbytes = int(self.subject.nbytes * _HEADROOM) if LOADERS[loader].copies else 0
        return {"kind": "loading", "loader": loader, "directory": self.subject.directory, "files": self.subject.files,
                "digests": self.subject.digests, "later": later, "recycle_bytes": nbytes}  # fmt: skip

    def _verify(self, loader: str, result: Result) -> None:
        if result["wrong"]:
            raise DigestMismatch(
                f"{loader}: {len(result['wrong'])} of {len(self.subject.digests)} tensors are not those of "
                f"{self.subject.directory}, the first is {result['wrong'][0]!r}; its timings are void"
            )

    def together(self, loader: str, home: Daemon, processes: int) -> Result:
        """So many processes load at once; what they hold when all of them are done, looked at from outside."""
        with ExitStack() as stack:
            workers = []
            for _ in range(processes):
                workers.append(Worker(self._task(loader), home.address))
                stack.callback(workers[-1].end)
            for worker in workers:
                worker.go()
            results = [worker.result() for worker in workers]
            private = [memory.private_bytes(worker.pid) for worker in workers]
            shared = [memory.rollup(pid)["Pss_Shmem"] for pid in (home.pid, *(worker.pid for worker in workers))]
        for result in results:
            self._verify(loader, result)
        grown = [now - result["private_before_bytes"] for now, result in zip(private, results, strict=True)]
        return {"processes": processes, "load_s": [result["load_s"] for result in results],
                "private_growth_bytes": grown, "pss_shmem_bytes": sum(shared)}  # fmt: skip


def resident(run: Run, home: Daemon) -> Results:
    """The model is in the daemon's memory, and its files are in the page cache."""
    results: Results = {name: [] for name in run.loaders}
    for name in run.turns(run.loaders, "resident"):
        if name != OURS:
            _warm(run.subject)
        later = 0 if LOADERS[name].copies else LATER_LOADS
        results[name].append(run.load(name, home.address, later))
    return results


def cold(run: Run, ahead: Daemon, bare: Daemon) -> Results:
    """The files are on disk only. `ahead` keeps spare memory, `bare` does not; neither has the model."""
    names = (DIRECT, OURS, NO_SPARE, *(name for name in run.loaders if name != OURS))
    results: Results = {name: [] for name in names}
    for name in run.turns(names, "cold"):
        if name == OURS:
            filled_s = ahead.wait_for_spare()
        left = page_cache.drop(run.subject.files)
        if name == DIRECT:
            result = run_worker({"kind": "direct", "files": run.subject.files})
        elif name in (OURS, NO_SPARE):
            home = ahead if name == OURS else bare
            result = _cold_of_ours(run, home)
            result |= {"spare_prefault_s": filled_s} if name == OURS else {}
        else:
            result = run.load(name, "")
        results[name].append(result | {"cached": left})
    return results


def _cold_of_ours(run: Run, home: Daemon) -> Result:
    memory.reset_peak(home.pid)
    result = run.load(OURS, home.address)
    after = memory.status(home.pid)
    model = home.model(run.subject.directory)
    assert model is not None
    result["figures"] = model["last_load"]
    result["staging_bytes"] = home.client.status()["staging_bytes"]
    result["daemon_growth_bytes"] = after["VmHWM"] - after["RssShmem"] - home.idle_bytes
    home.remove(run.subject.directory)
    return result


def shared(run: Run, home: Daemon) -> Results:
    """Several processes open the resident model at once."""
    results: Results = {name: [] for name in run.loaders}
    for name in run.loaders:
        if name != OURS:
            _warm(run.subject)
        processes = COPYING_PROCESSES if LOADERS[name].copies else PROCESSES
        run.say(f"{run.subject.label}: shared, {name}, {processes} processes")
        results[name].append(run.together(name, home, processes))
    model = home.model(run.subject.directory)
    assert model is not None
    for result in results[OURS]:
        result["page_bytes"] = model["page_bytes"]
    return results


def prefault(run: Run) -> Results:
    """Memory of the pool's kind, when it lay idle and used again."""
    task = {"kind": "prefault", "nbytes": PREFAULT_BYTES, "idle_s": IDLE_S}
    run.say(f"memory, {PREFAULT_RUNS} runs of {IDLE_S:.0f} s")
    return {"prefault": [run_worker(task) for _ in range(PREFAULT_RUNS)]}


def _warm(subject: Subject) -> None:
    held = page_cache.fill(subject.files)
    if held < page_cache.WARM:
        raise Refused(f"the page cache holds only {held:.1%} of {subject.directory}; free memory for a warm run")
