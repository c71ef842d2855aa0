"""Mappings of a perf.data file: which mapped file an address of a process was in. Reads no file."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiermem.perfdata import Image, PerfData
from tiermem.types import PAGE_BYTES

ANONYMOUS = "[anon]"
_ANONYMOUS_PATHS = ("//anon", "")
_TIME, _ADDRESS, _NBYTES = (Image._fields.index(name) for name in ("time", "address", "nbytes"))
_STEPS = 16
_GENERATIONS = 8
_FOREVER = (1 << 64) - 1


class MappedPages:
    """What each sample of a perf.data file touched: a mapped file and a 2 MiB page of it.

    `file`: intp, index in `files`; `page`: int64, of the file, or of the address space where it is no file (`[anon]`,
    `[heap]`). A perf.data file tells nothing of unmapping: of mappings that cover an address, the one that begins
    nearest below it counts, and among those the latest before the sample. A forked process has what its parent had
    then.
    """

    def __init__(self, data: PerfData) -> None:
        images = sorted((i for i in data.images if i.nbytes > 0 and i.pid >= 0), key=lambda i: (i.address, i.time))
        paths = [ANONYMOUS if image.path in _ANONYMOUS_PATHS else image.path for image in images]
        self.files = list(dict.fromkeys((ANONYMOUS, *paths)))
        number = {path: i for i, path in enumerate(self.files)}
        found = _find(images, data)
        of_file = np.array([number[path] for path in paths] + [0], np.intp)
        shift = np.array([(i.offset - i.address) % (1 << 64) for i in images] + [0], np.uint64)
        shift[[path.startswith("[") for path in paths] + [True]] = 0  # [heap], [stack] and the like are no files
        self.file = of_file[found]
        self.page = ((data.samples["addr"] + shift[found]) // np.uint64(PAGE_BYTES)).astype(np.int64)


def _find(images: list[Image], data: PerfData) -> npt.NDArray[np.intp]:
    """Index of the image that each sample's address is in; -1 where it is in none."""
    by_pid: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        by_pid.setdefault(image.pid, []).append(i)
    parents = {fork.pid: (fork.parent_pid, fork.time) for fork in data.forks if fork.pid != fork.parent_pid}
    start, nbytes, time = (np.array([i[k] for i in images], np.uint64) for k in (_ADDRESS, _NBYTES, _TIME))
    samples = data.samples
    found = np.full(len(samples), -1, np.intp)
    for pid in np.unique(samples["pid"]).tolist():
        rows = np.flatnonzero(samples["pid"] == pid)
        for owner, until in _lineage(pid, parents):
            known = np.array(by_pid.get(owner, ()), np.intp)
            if len(known):
                left = rows[found[rows] < 0]
                at = np.minimum(samples["time"][left], np.uint64(until))
                found[left] = _nearest(known, start[known], nbytes[known], time[known], samples["addr"][left], at)
    return found


def _lineage(pid: int, parents: dict[int, tuple[int, int]]) -> list[tuple[int, int]]:
    """The process and its ancestors, each with the time until which what it mapped is the process's as well."""
    lineage = [(pid, _FOREVER)]
    while lineage[-1][0] in parents and len(lineage) < _GENERATIONS:
        parent, forked = parents[lineage[-1][0]]
        lineage.append((parent, min(forked or _FOREVER, lineage[-1][1])))
    return lineage


def _nearest(
    known: npt.NDArray[np.intp],
    start: npt.NDArray[np.uint64],
    nbytes: npt.NDArray[np.uint64],
    time: npt.NDArray[np.uint64],
    addr: npt.NDArray[np.uint64],
    at_time: npt.NDArray[np.uint64],
) -> npt.NDArray[np.intp]:
    """Of the images `known`, ascending by start and time, the one of each address; -1 where none covers it.

    Goes down at most _STEPS images from the nearest, so that a file that maps one address a million times costs no
    more than another.
    """
    at = np.searchsorted(start, addr, "right") - 1
    found = np.full(len(addr), -1, np.intp)
    for _ in range(_STEPS):
        left = np.flatnonzero((found < 0) & (at >= 0))
        here = at[left]
        # Unsigned, so that an image whose end is beyond the last address has none.
        covers = (addr[left] - start[here] < nbytes[here]) & (time[here] <= at_time[left])
        found[left[covers]] = known[here[covers]]
        at[left] -= 1
    return found
