"""The reader of perf.data files against `perf script`: real recordings of this kernel, every field of every sample."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import perf_script
from tiermem.perfdata import PerfData, read

pytestmark = perf_script.needs_perf

WORKLOAD = """
import mmap, os, threading
def touch():
    memory = mmap.mmap(-1, 64 * 4096)
    for page in range(64): memory[page * 4096] = 1
threads = [threading.Thread(target=touch) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
pid = os.fork()
if not pid:
    open("/proc/self/comm", "w").write("child")
    touch(); os._exit(0)
os.waitpid(pid, 0)
"""
ALWAYS = ("comm", "pid", "time", "event", "period", "misc")
DATA = (*ALWAYS, "addr", "data_src")
UNTIMED = ("pid", "event", "period", "misc", "addr", "data_src")
BOTH = ("-e", "minor-faults,page-faults", "-c", "1")
FAULTS = ("-e", "minor-faults", "-c", "1")


@dataclass(frozen=True)
class Recording:
    options: tuple[str, ...]
    fields: tuple[str, ...]


RECORDINGS = {
    "data": Recording(("-d", *FAULTS), (*DATA, "ip")),
    "all": Recording(("-d", "--phys-data", "-W", "--data-page-size", "--code-page-size", "--sample-cpu", *FAULTS),
                     (*DATA, "ip", "cpu", "weight", "ins_lat", "phys_addr", "data_page_size", "code_page_size")),
    "pages": Recording(("-d", "--data-page-size", *FAULTS), (*DATA, "ip", "data_page_size")),
    "two events": Recording(("-d", "-e", "minor-faults,page-faults,major-faults", "-c", "1"), (*DATA, "ip")),
    "unlike events": Recording(("-d", "-e", "minor-faults/period=1/,cpu-clock/freq=500/"), (*DATA, "ip")),
    "by frequency": Recording(("-d", "-F", "2000", "-e", "cpu-clock"), (*DATA, "ip")),
    "host": Recording(("-a", "-d", "-e", "minor-faults,page-faults", "-c", "1"), (*DATA, "ip", "cpu")),
    "host, switches": Recording(("-a", "--switch-events", "-d", *FAULTS), (*DATA, "ip", "cpu")),
    "chains": Recording(("-g", "-d", "-W", *FAULTS), (*DATA, "weight")),
    "registers and stacks": Recording(("--call-graph", "dwarf,1024", "-d", *FAULTS), DATA),
    "registers": Recording(("--intr-regs=ax,bx", "-d", "--phys-data", *FAULTS), (*DATA, "ip", "phys_addr")),
    "statistics": Recording(("-s", "-d", *FAULTS), (*DATA, "ip")),
    "per thread": Recording(("--per-thread", "-d", *FAULTS), (*UNTIMED, "ip")),
    "cgroups": Recording(("--all-cgroups", "-d", *FAULTS), (*DATA, "ip")),
    "monotonic": Recording(("-k", "CLOCK_MONOTONIC", "-d", *FAULTS), (*DATA, "ip")),
    "compressed": Recording(("-z", "-d", *FAULTS), (*DATA, "ip")),
    "build ids": Recording(("--buildid-mmap", "-d", *FAULTS), (*DATA, "ip")),
}  # fmt: skip


PIPES = {"pipe": ("-d", *BOTH, "-o", "-"), "pipe, compressed": ("-z", "-d", *BOTH, "-o", "-")}
GROUP = {"group": ("-d", "-e", "{minor-faults,page-faults}:S", "-c", "1")}


def record(path: Path, options: Sequence[str]) -> str:
    """Writes a perf.data file; gives what perf says if it cannot."""
    target = () if "-o" in options else ("-o", str(path))
    workload = (sys.executable, "-I", "-S", "-c", WORKLOAD)
    command = [str(perf_script.PERF), "record", "-N", *options, *target, "--", *workload]
    with open(path, "wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, cwd=path.parent, timeout=60, check=False)
    return done.stderr.decode() if done.returncode else ""


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Name -> its file; skips by what perf says where this host refuses.

    Most are made at once, because perf mostly waits. Those of the whole host are made alone: Linux 6.18 hands one
    perf_sample_data to all who watch a software event, and a second recording's samples may get the first one's ids.
    """
    directory = tmp_path_factory.mktemp("perf")
    wanted = {name: recording.options for name, recording in RECORDINGS.items()} | PIPES | GROUP
    together = [name for name, options in wanted.items() if "-a" not in options]
    with ThreadPoolExecutor(len(together)) as pool:
        refused = dict(
            zip(together, pool.map(lambda name: record(directory / name, wanted[name]), together), strict=True)
        )
    refused |= {name: record(directory / name, options) for name, options in wanted.items() if name not in refused}

    def get(name: str) -> Path:
        if refusal := refused[name]:
            pytest.skip(f"lacks what perf record {' '.join(wanted[name])} needs: {' '.join(refusal.split())[:150]}")
        return directory / name

    yield get
    shutil.rmtree(directory)


def compare(data: PerfData, said: list[dict[str, object]]) -> None:
    """Every field that perf printed, of every sample, in its order."""
    assert len(said) == len(data.samples) > 0
    columns = {name: data.samples[name].tolist() for name in data.samples.dtype.names}
    columns["event"] = [data.events[number].name for number in columns["event"]]
    columns["misc"] = [misc & 7 for misc in columns["misc"]]
    columns["comm"] = [
        data.comm_at(pid, tid, time)
        for pid, tid, time in zip(columns["pid"], columns["tid"], columns["time"], strict=True)
    ]
    for name in said[0]:
        assert [row[name] for row in said] == columns[name], name


@pytest.mark.parametrize("name", RECORDINGS)
def test_samples_are_those_that_perf_prints(recordings: Callable[[str], Path], name: str) -> None:
    path = recordings(name)
    data = read(str(path))
    assert data.notes == ()
    compare(data, perf_script.samples(path, RECORDINGS[name].fields))
    images, tasks = perf_script.sideband(path)
    assert [image[:1] + image[2:] for image in data.images] == images
    assert [fork[:4] for fork in data.forks] == [task[1:] for task in tasks if task[0] == "FORK"]
    assert [gone[:2] for gone in data.exits] == [task[1:3] for task in tasks if task[0] == "EXIT"]


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_holds_the_same(recordings: Callable[[str], Path], name: str) -> None:
    path = recordings(name)
    data = read(str(path))
    assert data.notes == ()
    compare(data, perf_script.samples(path, DATA, pipe=True))


def test_a_group_reads_its_members_with_each_sample_of_the_leader(recordings: Callable[[str], Path]) -> None:
    """perf makes a sample of its own of every member's count; the file has the leader's only."""
    path = recordings("group")
    said = perf_script.samples(path, ("comm", "pid", "time", "event", "misc", "addr", "data_src", "ip"))
    compare(read(str(path)), [row for row in said if str(row["event"]).startswith("minor-faults")])


def test_the_header_says_what_perf_prints_of_it(recordings: Callable[[str], Path]) -> None:
    path = recordings("data")
    text = perf_script.perf("script", "-f", "--header-only", "-i", str(path))
    said = {name.strip("# "): value for name, _, value in (line.partition(" : ") for line in text.splitlines())}
    data = read(str(path))
    assert data.hostname == said["hostname"]
    assert data.os_release == said["os release"]
    assert data.perf_version == said["perf version"]
    assert data.arch == said["arch"]
    assert str(data.cpus) == said["nrcpus online"]
    assert data.cpu == said["cpudesc"]
    assert data.cpuid == said["cpuid"]
    assert f"{data.memory_bytes >> 10} kB" == said["total memory"]
    assert " ".join(data.command).startswith(said["cmdline"].strip())
    listed = perf_script.perf("buildid-list", "-f", "-i", str(path)).split()
    assert sorted(data.build_ids.values()) == sorted(listed[::2])
